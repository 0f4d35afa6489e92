"""The manifest against hashes by hand, and the differences between two manifests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dapo_mcore.convert.convert import Cut, hf_to_mcore
from dapo_mcore.convert.job import NoReport
from dapo_mcore.convert.verify import Entry, differences, manifest


class Counter(NoReport):
    def __init__(self) -> None:
        self.total = self.done = 0

    def start(self, total: int, done: int) -> None:
        self.total = total

    def advance(self, num_bytes: int) -> None:
        self.done += num_bytes


def test_a_manifest_is_the_same_for_both_kinds_of_folder(tmp_path: Path, hf_folder: Callable[..., Path]) -> None:
    source = hf_folder("qwen3-moe", torch.bfloat16)
    hf_to_mcore(source, tmp_path / "mcore", Cut(2, 2, 2), NoReport())
    ours, theirs = manifest(source, counter := Counter()), manifest(tmp_path / "mcore", NoReport())
    tensors = load_file(source / "model.safetensors")
    assert ours == theirs and ours.keys() == tensors.keys()
    assert counter.total == counter.done == sum(tensor.nbytes for tensor in tensors.values())
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    raw = tensors[name].view(torch.uint8).numpy().tobytes()
    assert ours[name] == Entry((24, 32), "bfloat16", hashlib.sha256(raw).hexdigest())
    assert str(ours[name]) == f"[24, 32] bfloat16 {ours[name].sha256[:12]}"


def test_a_single_bit_is_a_difference(tmp_path: Path, hf_folder: Callable[..., Path]) -> None:
    """The sign of a zero: equal as numbers, but not as files."""
    state = load_file(hf_folder("qwen2") / "model.safetensors")
    entries = []
    for sign in (1.0, -1.0):
        folder = tmp_path / str(sign)
        folder.mkdir()
        state["model.norm.weight"][0] = 0.0 * sign
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_bytes((hf_folder("qwen2") / "config.json").read_bytes())
        entries.append(manifest(folder, NoReport()))
    (line,) = differences(*entries)
    assert line.startswith("model.norm.weight: [32] float32 ") and " in the first, [32] float32 " in line


def test_what_counts_as_a_difference() -> None:
    same, other, cast = Entry((2,), "float32", "a"), Entry((2,), "float32", "b"), Entry((2,), "bfloat16", "a")
    ours = {"same": same, "hash": same, "dtype": same, "shape": same, "mine": same}
    theirs = {"same": same, "hash": other, "dtype": cast, "shape": Entry((1, 2), "float32", "a"), "theirs": same}
    assert differences(ours, theirs) == [
        "mine: only in the first",
        "theirs: only in the second",
        "hash: [2] float32 a in the first, [2] float32 b in the second",
        "dtype: [2] float32 a in the first, [2] bfloat16 a in the second",
        "shape: [2] float32 a in the first, [1, 2] float32 a in the second",
    ]
    assert differences(ours, ours) == []
