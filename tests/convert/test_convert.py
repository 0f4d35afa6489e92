"""HF → Megatron → HF is exact for every family, dtype and layout, also after an interruption."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dapo_mcore.convert import convert as conversion
from dapo_mcore.convert.convert import Cut, hf_to_mcore, mcore_to_hf
from dapo_mcore.convert.job import JOURNAL, NoReport
from dapo_mcore.errors import CheckpointError
from dapo_mcore.model_files.hf_folder import SafetensorsReader
from tests.model_files.round_trip import (
    EMBEDDING,
    ONE_FILE,
    SMALL,
    Folders,
    assert_same_model,
    edited_copy,
    round_trip,
    round_trip_back,
    tensors_of,
)
from tests.model_files.zoo import CONFIGS, MOE, TEXTS

DENSE_CUTS = [Cut(tensor, pipeline) for tensor in (1, 2, 4) for pipeline in (1, 2)]
MOE_CUTS = [Cut(), Cut(2, 1, 2), Cut(4, 2, 1), Cut(1, 2, 2), Cut(2, 2, 2, 2), Cut(2, 1, 4, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_round_trip_is_exact(family: str, dtype: torch.dtype, tmp_path: Path, hf_folder: Folders) -> None:
    """Every layout on Megatron's side: three layers on two stages, and 101 words padded to 104, 112 or 128."""
    source = hf_folder(family, dtype, shard="20KB" if dtype == torch.float32 else "5GB")
    for number, cut in enumerate(MOE_CUTS if family in MOE else DENSE_CUTS):
        out = round_trip(source, tmp_path / str(cut), cut, SMALL if number % 2 else ONE_FILE)
        assert_same_model(out, source)
        assert (out / "model.safetensors").exists() != (out / "model.safetensors.index.json").exists()
        assert SafetensorsReader(out).names


def test_a_routing_bias_may_be_wider_than_the_rest(tmp_path: Path, hf_folder: Folders) -> None:
    """As in DeepSeek-V3's own files; every other tensor must not."""
    source = hf_folder("deepseek-v3", torch.bfloat16)

    def widen(state: dict[str, torch.Tensor]) -> None:
        state |= {name: tensor.float() for name, tensor in state.items() if name.endswith("correction_bias")}

    copy = edited_copy(source, tmp_path, widen)
    assert sorted(str(tensor.dtype) for tensor in tensors_of(copy).values())[-2:] == ["torch.float32"] * 2
    assert_same_model(round_trip(copy, tmp_path / "work", Cut(2, 2, 2)), copy)


def test_half_precision_and_sizes_that_the_padding_does_not_change(tmp_path: Path, hf_folder: Folders) -> None:
    source = hf_folder("qwen2", torch.float16, vocab_size=128)
    assert_same_model(round_trip(source, tmp_path, Cut(2)), source)


@pytest.mark.parametrize("family", ["qwen2-tied", "qwen3", "mixtral", "qwen2-moe-mixed"])
def test_transformers_computes_the_same_from_the_result(family: str, tmp_path: Path, hf_folder: Folders) -> None:
    source = hf_folder(family)
    out = round_trip(source, tmp_path, Cut(2, 2), SMALL)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        ours, theirs = (AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits for folder in (out, source))
    assert torch.equal(ours, theirs)


def test_the_index_has_the_same_content_as_transformers_index(tmp_path: Path, hf_folder: Folders) -> None:
    source = hf_folder("qwen2", torch.float32, shard="20KB")
    out = round_trip(source, tmp_path, shard_bytes=SMALL)
    ours, theirs = (json.loads((folder / "model.safetensors.index.json").read_bytes()) for folder in (out, source))
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    assert set(ours["weight_map"].values()) == {path.name for path in out.glob("*.safetensors")}
    sizes = {path: sum(t.nbytes for t in load_file(path).values()) for path in out.glob("*.safetensors")}
    # a parameter's tensors stay together: gate and up, and query, key and value, fit into one file
    assert len(sizes) > 3 and max(sizes.values()) <= SMALL


def test_a_converted_folder_has_one_file_per_layer(tmp_path: Path, hf_folder: Folders) -> None:
    """One file per layer and one each for embedding and head, named by the stage that reads it."""
    hf_to_mcore(hf_folder("qwen2"), tmp_path / "out", Cut(2, 2), NoReport())
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    chunks = {f"megatron/__{stage}_{number}.distcp" for number, stage in enumerate((0, 0, 0, 1, 1))}
    described = {"megatron/.metadata", "megatron/metadata.json", "megatron/common.pt"}
    assert files == {"config.json", "generation_config.json", *TEXTS, *chunks, *described}


def test_the_output_head_of_tied_embeddings_is_left_out(tmp_path: Path, hf_folder: Folders) -> None:
    """Older exports of tied models carry the copy; transformers writes none."""
    source = hf_folder("qwen2-tied")
    copy = edited_copy(source, tmp_path, lambda state: state.update({"lm_head.weight": state[EMBEDDING].clone()}))
    assert_same_model(round_trip(copy, tmp_path / "work"), source)


def test_buffers_that_a_model_computes_itself_are_left_out(tmp_path: Path, hf_folder: Folders) -> None:
    extra = "model.layers.0.self_attn.rotary_emb.inv_freq"
    copy = edited_copy(hf_folder("llama"), tmp_path, lambda state: state.update({extra: torch.ones(4)}))
    assert_same_model(round_trip(copy, tmp_path / "work"), hf_folder("llama"))


class Interrupting(NoReport):
    """Raise KeyboardInterrupt after so many tensors (-1: never) in every thread, and remember where the job began."""

    def __init__(self, after: int):
        self.left, self.began, self.count = after, (0, 0), 0

    def start(self, total: int, done: int) -> None:
        self.began = (total, done)

    def advance(self, num_bytes: int) -> None:
        self.count += 1
        if 0 < self.left <= self.count:
            raise KeyboardInterrupt


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def times(partial: Path) -> dict[str, int]:
    """Return inode and time of each finished file by its name."""
    done = json.loads((partial / JOURNAL).read_bytes())["done"]
    return {name: ((partial / name).stat().st_ino, (partial / name).stat().st_mtime_ns) for name in done}


@pytest.mark.parametrize("direction", ["hf-to-mcore", "mcore-to-hf"])
def test_an_interrupted_conversion_continues(direction: str, tmp_path: Path, hf_folder: Folders) -> None:
    source = hf_folder("qwen3-moe")
    hf_to_mcore(source, mcore := tmp_path / "mcore", Cut(2, 2, 2), NoReport())

    def convert(out: Path, report: Any) -> Path:
        if direction == "hf-to-mcore":
            hf_to_mcore(source, out, Cut(2, 2, 2), report)
        else:
            mcore_to_hf(mcore, out, report, SMALL)
        return out

    whole = contents(convert(tmp_path / "whole", counting := Interrupting(-1)))
    partial, finished = tmp_path / "out.partial", {}
    for after in (counting.count // 2, counting.count // 4):
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path / "out", Interrupting(after))
        assert not (tmp_path / "out").exists()
        assert times(partial) and finished.items() <= times(partial).items()
        finished = times(partial)
    convert(tmp_path / "out", report := Interrupting(-1))
    assert 0 < report.began[1] < report.began[0]
    kept = {
        name: ((tmp_path / "out" / name).stat().st_ino, (tmp_path / "out" / name).stat().st_mtime_ns)
        for name in finished
    }
    assert kept == finished
    assert not partial.exists()
    assert contents(tmp_path / "out") == whole


def test_other_options_or_inputs_start_from_the_beginning(tmp_path: Path, hf_folder: Folders) -> None:
    source = Path(shutil.copytree(hf_folder("qwen2"), tmp_path / "source"))
    out = tmp_path / "out"

    def interrupted() -> None:
        with pytest.raises(KeyboardInterrupt):
            hf_to_mcore(source, out, Cut(), Interrupting(25))

    interrupted()
    hf_to_mcore(source, out, Cut(2), report := Interrupting(-1))
    assert report.began[1] == 0
    shutil.rmtree(out)
    interrupted()
    state = {name: tensor + 1 for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(state, source / "model.safetensors", {"format": "pt"})
    hf_to_mcore(source, out, Cut(), report := Interrupting(-1))
    assert report.began[1] == 0
    assert_same_model(round_trip_back(out, tmp_path), source)


def test_a_conversion_continues_after_the_disk_was_full(
    tmp_path: Path, hf_folder: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, count, original = hf_folder("qwen2-moe"), [], conversion.write_chunk

    def write_chunk(*arguments: Any) -> Any:
        count.append(1)
        if len(count) > 60:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments)

    with (
        monkeypatch.context() as patch,
        pytest.raises(CheckpointError, match="is full; free some space and start again"),
    ):
        patch.setattr(conversion, "write_chunk", write_chunk)
        hf_to_mcore(source, tmp_path / "out", Cut(2), NoReport())
    assert not (tmp_path / "out").exists()
    finished = times(tmp_path / "out.partial")
    hf_to_mcore(source, tmp_path / "out", Cut(2), report := Interrupting(-1))
    assert finished and report.began[1] > 0
    assert_same_model(round_trip_back(tmp_path / "out", tmp_path), source)


KILLED = """
import os, signal, sys
from pathlib import Path
from dapo_mcore.convert.convert import Cut, hf_to_mcore

class Killing:
    left = 60
    def start(self, total, done): ...
    def advance(self, num_bytes):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)

hf_to_mcore(Path(sys.argv[1]), Path(sys.argv[2]), Cut(2, 1, 2), Killing())
"""


def test_the_work_of_a_killed_process_is_continued(tmp_path: Path, hf_folder: Folders) -> None:
    """SIGKILL comes from a batch system or if memory runs out; the process cannot clean up."""
    source = hf_folder("qwen2-moe")
    root = Path(__file__).parents[2]
    process = subprocess.run(
        [sys.executable, "-c", KILLED, source, tmp_path / "out"], cwd=root, env=os.environ | {"PYTHONPATH": str(root)}
    )
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and times(tmp_path / "out.partial")
    hf_to_mcore(source, tmp_path / "out", Cut(2, 1, 2), report := Interrupting(-1))
    assert report.began[1] > 0
    hf_to_mcore(source, tmp_path / "again", Cut(2, 1, 2), NoReport())
    assert contents(tmp_path / "out") == contents(tmp_path / "again")
    assert_same_model(round_trip_back(tmp_path / "out", tmp_path), source)
