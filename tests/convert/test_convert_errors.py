"""Folders and layouts that cannot be converted: each gives an error with the tensor or key, and leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dapo_mcore.convert.convert import Cut, hf_to_mcore, mcore_to_hf
from dapo_mcore.convert.job import NoReport
from dapo_mcore.errors import CheckpointError, ConfigError, DapoError
from tests.model_files.round_trip import (
    EMBEDDING,
    HEAD,
    NORM,
    WHOLE,
    Folders,
    assert_same_model,
    edited_copy,
    round_trip_back,
    set_config,
)

INDEX = "model.safetensors.index.json"


def refused(source: Path, work: Path, match: str, cut: Cut = WHOLE, error: type = DapoError) -> None:
    with pytest.raises(error, match=match):
        hf_to_mcore(source, work / "out", cut, NoReport())
    assert [path for path in work.iterdir() if path.name.startswith("out")] == []


TENSOR_EDITS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": (lambda state: state.pop(NORM), rf"has no tensor {NORM}; it does not fit its config\.json"),
    "missing expert": (
        lambda state: state.pop("model.layers.1.mlp.experts.3.up_proj.weight"),
        r"has no tensor model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight",
    ),
    "extra": (
        lambda state: state.update({"model.layers.3.mlp.gate.weight": torch.ones(1)}),
        r"holds 1 tensors that Qwen2MoeForCausalLM does not have, such as model\.layers\.3\.mlp\.gate\.weight",
    ),
    "shape": (
        lambda state: state.update({NORM: torch.ones(31)}),
        rf"{NORM} is \[31\], but config\.json implies \[32\]: they disagree",
    ),
    "transposed": (
        lambda state: state.update({EMBEDDING: state[EMBEDDING].t().contiguous()}),
        rf"{EMBEDDING} is \[32, 101\], but config\.json implies \[101, 32\]",
    ),
    "mixed dtypes": (
        lambda state: state.update({NORM: state[NORM].bfloat16()}),
        rf"{NORM} is torch\.bfloat16, {EMBEDDING} is torch\.float32; all must be one of",
    ),
    "int8": (
        lambda state: state.update({name: tensor.to(torch.int8) for name, tensor in state.items()}),
        r"embed_tokens\.weight is int8, but weights must be float32, bfloat16 or float16; give the model's unquantized",
    ),
    "float8": (
        lambda state: state.update({name: tensor.to(torch.float8_e4m3fn) for name, tensor in state.items()}),
        r"embed_tokens\.weight is float8_e4m3fn, but",
    ),
}  # fmt: skip


@pytest.mark.parametrize("edit", TENSOR_EDITS)
def test_tensors_that_do_not_fit_are_refused(edit: str, tmp_path: Path, hf_folder: Folders) -> None:
    change, told = TENSOR_EDITS[edit]
    refused(edited_copy(hf_folder("qwen2-moe"), tmp_path, change), tmp_path, told, error=CheckpointError)


def test_a_tied_head_that_differs_from_the_embedding_is_refused(tmp_path: Path, hf_folder: Folders) -> None:
    """transformers would untie the two; leaving one out would change the model."""
    copy = edited_copy(
        hf_folder("qwen2-tied"), tmp_path, lambda state: state.update({HEAD: state[EMBEDDING].clone() + 1})
    )
    refused(copy, tmp_path, rf"{HEAD} differs from {EMBEDDING}, but config\.json says tie_word_embeddings")


CONFIG_EDITS: dict[str, tuple[dict[str, Any], str]] = {
    "hidden": ({"hidden_size": 64}, r"is \[101, 32\], but config\.json implies \[101, 64\]"),
    "vocabulary": ({"vocab_size": 102}, r"embed_tokens\.weight is \[101, 32\], but config\.json implies \[102, 32\]"),
    "layers": ({"num_hidden_layers": 4, "layer_types": None}, r"has no tensor model\.layers\.3\."),
    "fewer layers": ({"num_hidden_layers": 2, "layer_types": None}, r"holds \d+ tensors that .* does not have, such as model\.layers\.2"),
    "kv heads": ({"num_key_value_heads": 4}, r"k_proj\.weight is \[16, 32\], but config\.json implies \[32, 32\]"),
    "uneven heads": ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
    "mlp": ({"intermediate_size": 40}, r"gate_proj\.weight is \[48, 32\], but config\.json implies \[40, 32\]"),
    "tied": ({"tie_word_embeddings": True}, "lm_head.weight differs from"),
    "architecture": ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not supported"),
    "unknown type": ({"model_type": "unheard-of"}, r"transformers cannot read .*config\.json"),
}  # fmt: skip


@pytest.mark.parametrize("edit", CONFIG_EDITS)
def test_configs_that_disagree_with_the_tensors_are_refused(edit: str, tmp_path: Path, hf_folder: Folders) -> None:
    changes, told = CONFIG_EDITS[edit]
    copy = Path(shutil.copytree(hf_folder("qwen2"), tmp_path / "source"))
    set_config(copy, **changes)
    refused(copy, tmp_path, told)


def broken_files(folder: Path, how: str) -> str:
    """Break a folder of several files, and return what the error must say."""
    index = json.loads((folder / INDEX).read_bytes())
    shard = folder / index["weight_map"][NORM]
    if how == "truncated data":
        os.truncate(shard, shard.stat().st_size - 1)
        return rf"{shard.name} is truncated: .* ends at byte"
    if how == "truncated header":
        os.truncate(shard, 20)
        return rf"{shard.name} is truncated: its header"
    if how == "missing shard":
        shard.unlink()
        return rf"{shard.name} is missing; fetch"
    if how == "index names a stranger":
        index["weight_map"]["model.unheard.weight"] = shard.name
        (folder / INDEX).write_text(json.dumps(index))
        return rf"names model\.unheard\.weight in {shard.name}, which lacks it"
    if how == "index of two files":
        (folder / INDEX).write_bytes((folder / INDEX).read_bytes()[:-20])
        return rf"{INDEX} is broken"
    if how == "no config":
        (folder / "config.json").unlink()
        return r"holds no model: no config\.json in it; give a Hugging Face model folder"
    (folder / INDEX).unlink()
    return "has no weights: it holds neither model.safetensors nor"


@pytest.mark.parametrize(
    "how",
    [
        "truncated data", "truncated header", "missing shard", "index names a stranger", "index of two files",
        "no config", "no index",
    ],
)  # fmt: skip
def test_broken_files_are_refused(how: str, tmp_path: Path, hf_folder: Folders) -> None:
    copy = Path(shutil.copytree(hf_folder("qwen2", torch.float32, shard="20KB"), tmp_path / "source"))
    refused(copy, tmp_path, broken_files(copy, how))


@pytest.mark.parametrize(
    ("family", "cut", "told"),
    [
        ("qwen2", Cut(3), "--tensor-parallel 3 does not divide num_attention_heads 4; use one of 1, 2, 4$"),
        ("qwen2", Cut(8), "--tensor-parallel 8 does not divide"),
        ("qwen2", Cut(1, 4), "--pipeline-parallel 4 exceeds num_hidden_layers 3"),
        ("qwen2", Cut(1, 1, 2), "--expert-parallel 2 .* Qwen2ForCausalLM has no experts"),
        ("qwen2", Cut(1, 1, 1, 2), "--expert-tensor-parallel 2 .* Qwen2ForCausalLM has no experts"),
        ("qwen3-moe", Cut(1, 1, 3), "--expert-parallel 3 does not divide the number of experts, 4"),
        ("qwen3-moe", Cut(1, 1, 8), "--expert-parallel 8 does not divide the number of experts, 4"),
        ("qwen3-moe", Cut(1, 1, 1, 16), "tensor parallel 16 does not divide the 24 rows of .*experts"),
        ("qwen2-moe", Cut(4), None),
    ],
)
def test_layouts_that_do_not_fit_are_refused(
    family: str, cut: Cut, told: str | None, tmp_path: Path, hf_folder: Folders
) -> None:
    if told is None:
        hf_to_mcore(hf_folder(family), tmp_path / "out", cut, NoReport())
    else:
        refused(hf_folder(family), tmp_path, told, cut, ConfigError)


def test_folders_of_the_other_kind_and_outputs_that_exist_are_refused(tmp_path: Path, hf_folder: Folders) -> None:
    source, mcore = hf_folder("qwen2"), tmp_path / "mcore"
    hf_to_mcore(source, mcore, Cut(), NoReport())
    with pytest.raises(CheckpointError, match="is a Megatron checkpoint already; the other direction is mcore-to-hf"):
        hf_to_mcore(mcore, tmp_path / "out", Cut(), NoReport())
    with pytest.raises(CheckpointError, match=r"holds no Megatron checkpoint: it lacks megatron/\.metadata"):
        mcore_to_hf(source, tmp_path / "out", NoReport())
    for convert in (
        lambda: hf_to_mcore(source, mcore, Cut(), NoReport()),
        lambda: mcore_to_hf(mcore, mcore, NoReport()),
    ):
        with pytest.raises(CheckpointError, match="mcore exists; give another folder, or remove it"):
            convert()
    assert [path.name for path in tmp_path.iterdir()] == ["mcore"]
    assert_same_model(round_trip_back(mcore, tmp_path), source)


@pytest.mark.parametrize("how", ["truncated", "missing", "zeros", "metadata", "config"])
def test_broken_megatron_checkpoints_are_refused(how: str, tmp_path: Path, hf_folder: Folders) -> None:
    hf_to_mcore(hf_folder("qwen2"), mcore := tmp_path / "mcore", Cut(2), NoReport())
    chunk = mcore / "megatron" / "__0_1.distcp"
    told = {
        "truncated": r"__0_1\.distcp is truncated: decoder\.layers\.",
        "missing": r"__0_1\.distcp is missing: decoder\.layers\.",
        "zeros": r"__0_1\.distcp is damaged: decoder\.layers\.",
        "metadata": r"\.metadata cannot be read",
        "config": r"decoder\.layers\.mlp\.linear_fc1\.weight is \[3, 96, 32\], but config\.json implies \[3, 80, 32\]",
    }
    if how == "truncated":
        os.truncate(chunk, chunk.stat().st_size - 1)
    elif how == "missing":
        chunk.unlink()
    elif how == "zeros":
        chunk.write_bytes(bytes(chunk.stat().st_size))
    elif how == "metadata":
        os.truncate(mcore / "megatron" / ".metadata", 100)
    else:
        set_config(mcore, intermediate_size=40)
    with pytest.raises(CheckpointError, match=told[how]):
        mcore_to_hf(mcore, tmp_path / "out", NoReport())
    assert [path.name for path in tmp_path.iterdir()] == ["mcore"]


def test_a_disk_that_is_too_small_is_refused(
    tmp_path: Path, hf_folder: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    refused(hf_folder("qwen2"), tmp_path, r"out needs 0\.1 GB, but its disk has 0\.0 GB free")
