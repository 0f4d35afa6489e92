from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dapo_mcore.config.file import load_config
from dapo_mcore.replay.compare import Check, Verdict
from dapo_mcore.replay.details import first_element, weights_folder, with_details
from dapo_mcore.replay.recorded_run import RecordedRun
from tests.replay.planted import QUICKSTART, in_batch, unchanged, write_run


def flipped(folder: Path, tensor: str, index: tuple[int, ...], target: Path) -> Path:
    """Copy a model folder with the lowest bit of one element changed."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    tensors[tensor].view(torch.int32)[index] ^= 1
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("family", "tensor", "index", "name"),
    [
        ("qwen2", "model.layers.1.self_attn.k_proj.bias", (5,), "decoder.layers.1.self_attention.linear_qkv.bias"),
        (
            "qwen3-moe",
            "model.layers.2.mlp.experts.3.down_proj.weight",
            (31, 7),
            "decoder.layers.2.mlp.experts.experts.linear_fc2.weight",
        ),
    ],
)
def test_one_bit_of_a_weight_is_found(hf_folder, tmp_path, family, tensor, index, name):
    folder = hf_folder(family)
    other = flipped(folder, tensor, index, tmp_path / "other")
    config = load_config(QUICKSTART, [f"model.path={folder}", "model.init=pretrained", "warm_start=null"])
    assert weights_folder(tmp_path, config, 0) == folder and weights_folder(tmp_path, config, 1) is None
    element = first_element(name, config, folder, other)
    assert (element.tensor, tuple(element.index)) == (tensor, index)
    values = [load_file(each / "model.safetensors")[tensor][index].item() for each in (folder, other)]
    assert element.values == values and values[0] != values[1]
    assert first_element(name, config, folder, folder) is None


def test_the_text_around_a_token_is_told(model_folder, tmp_path):
    def run(name: str, token: int) -> RecordedRun:
        tokens = np.array([10, 11, token, 13, 14, 15, 16])
        change = in_batch("tokens", slice(0, 7), tokens)
        return RecordedRun(
            write_run(tmp_path / name, f"model.path={model_folder}", steps=1, changes={1: (unchanged, change)})
        )

    check = Check("tokens", Verdict.DIFFERS, "here", {"sample": 0, "position": 2})
    told = with_details(check, (run("a", 12), run("b", 20)), 1)
    a, b = told.place["texts"]
    assert told.detail == f"here; text {a!r} against {b!r}"
    assert len(a) == 6 and [x == y for x, y in zip(a, b, strict=True)] == [True, True, False, True, True, True]


def test_a_folder_that_is_gone_leaves_the_check_as_it_is(tmp_path):
    runs = (RecordedRun(write_run(tmp_path / "a")), RecordedRun(write_run(tmp_path / "b")))
    for check in (
        Check("tokens", Verdict.DIFFERS, "here", {"sample": 0, "position": 2}),
        Check("weights before", Verdict.DIFFERS, "here", {"tensor": "w"}),
        Check("requests", Verdict.DIFFERS, "here", {"sample": 0}),
    ):
        assert with_details(check, runs, 1) is check
