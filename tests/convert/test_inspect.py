"""The description of a folder, against counts by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from dapo_mcore.convert.convert import Cut, hf_to_mcore
from dapo_mcore.convert.inspect import describe
from dapo_mcore.convert.job import NoReport


def test_a_hugging_face_folder(hf_folder: Callable[..., Path]) -> None:
    """Per layer: q 1024 + 32, k and v 512 + 16 each, o 1024, the MLP 3 · 1536, two norms of 32; ends 2 · 3232 + 32."""
    folder = hf_folder("qwen2", torch.float32)
    lines = describe(folder).splitlines()
    parameters = 3 * (1056 + 2 * 528 + 1024 + 3 * 1536 + 64) + 2 * 3232 + 32
    size = (folder / "model.safetensors").stat().st_size
    assert lines == [
        f"{folder}: a Hugging Face folder",
        "Qwen2ForCausalLM: 3 layers, hidden 32, 4 heads over 2 key-value heads of 8, vocabulary 101, MLP 48",
        f"{parameters:,} parameters in {3 * 12 + 3} tensors, float32",
        f"1 file, {size / 1e9:.3f} GB",
    ]


def test_a_megatron_folder_with_experts(tmp_path: Path, hf_folder: Callable[..., Path]) -> None:
    """Layers that differ are not stacked; gate and up of a layer are in 4 experts × 2 halves × 2 ranks = 16 chunks."""
    hf_to_mcore(hf_folder("qwen2-moe-mixed", torch.bfloat16), tmp_path / "out", Cut(2, 1, 2, 2), NoReport())
    lines = describe(tmp_path / "out").splitlines()
    assert lines[0] == f"{tmp_path / 'out'}: a Megatron distributed checkpoint"
    assert lines[1].endswith("vocabulary 101, 4 experts of 24 and a shared one of 40 in 2 layers")
    assert lines[2].endswith(" tensors, bfloat16")
    assert lines[3].startswith("7 files, ") and lines[3].endswith("; its most divided tensor lies in 16 chunks")


def test_tied_embeddings_and_single_tensors(hf_folder: Callable[..., Path]) -> None:
    text = describe(hf_folder("qwen2-tied"), every_tensor=True)
    assert "vocabulary 101 (tied), MLP 48" in text
    assert text.splitlines()[4] == "  model.embed_tokens.weight  [101, 32]"
    assert text.splitlines()[-1] == "  model.norm.weight  [32]"
    assert len(text.splitlines()) == 4 + 3 * 12 + 2
