"""Stored tensors that are not weights of the model. tests/convert/test_convert_errors.py has the same for convert."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dapo_mcore.architecture.tensor_check import FiniteReader
from dapo_mcore.config.model import ModelConfig
from dapo_mcore.errors import CheckpointError
from dapo_mcore.model_files.hf_folder import open_weights
from tests.model_files.round_trip import EMBEDDING, HEAD, NORM, Folders, edited_copy
from tests.model_files.zoo import config_of

MTP = "model.layers.3.eh_proj.weight"


class Dictionary(dict):
    """A WeightReader of tensors in memory."""

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> torch.Tensor:
        return self[name] if dim is None else self[name].narrow(dim, start, stop - start)


@pytest.mark.parametrize(("value", "dtype"), [(math.nan, torch.float32), (-math.inf, torch.bfloat16)])
def test_values_that_are_not_finite_are_refused_where_they_are_read(value: float, dtype: torch.dtype) -> None:
    weight = torch.ones(4, 3, dtype=dtype)
    weight[2, 1] = weight[3, 0] = value
    reader = FiniteReader(Dictionary(w=weight))
    assert torch.equal(reader.read("w", 0, 0, 2), weight[:2])
    with pytest.raises(CheckpointError, match="w holds 2 values that are NaN or infinite, of 12 read"):
        reader.read("w")
    with pytest.raises(CheckpointError, match=r"w holds 1 values .*, of 3 read"):
        reader.read("w", 0, 2, 3)


def test_large_values_whose_sum_overflows_are_finite() -> None:
    weight = torch.full((4,), 3e38)
    assert FiniteReader(Dictionary(w=weight)).read("w") is weight


BAD: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": ("qwen2", lambda state: state.pop(NORM), f"has no tensor {NORM}"),
    "extra": ("qwen2", lambda state: state.update(other=torch.ones(1)), "1 tensors that .* does not have, such as other"),
    "misshapen": ("qwen2", lambda state: state.update({NORM: torch.ones(31)}), rf"{NORM} is \[31\]"),
    "int8": ("qwen2", lambda state: state.update({NORM: torch.ones(32, dtype=torch.int8)}), f"{NORM} is int8, but"),
    "float8": (
        "qwen2",
        lambda state: state.update({NORM: torch.ones(32).to(torch.float8_e4m3fn)}),
        f"{NORM} is float8_e4m3fn, but weights must be float32, bfloat16 or float16; give .* unquantized",
    ),
    "another head": ("qwen2-tied", lambda state: state.update({HEAD: state[EMBEDDING] + 1}), f"{HEAD} differs from"),
    "two layers more": (
        "deepseek-v3",
        lambda state: state.update({MTP: torch.ones(1), MTP.replace("3", "4"): torch.ones(1)}),
        r"1 tensors that .* does not have, such as model\.layers\.4\.eh_proj\.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("edit", BAD)
def test_a_run_does_not_start_from_a_folder_with_other_tensors(edit: str, tmp_path: Path, hf_folder: Folders) -> None:
    family, change, told = BAD[edit]
    folder = edited_copy(hf_folder(family), tmp_path, change)
    with pytest.raises(CheckpointError, match=told):
        open_weights(ModelConfig(path=str(folder)), config_of(family), seed=0)


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path, hf_folder: Folders) -> None:
    folder = edited_copy(hf_folder("deepseek-v3"), tmp_path, lambda state: state.update({MTP: torch.ones(1)}))
    reader = open_weights(ModelConfig(path=str(folder)), config_of("deepseek-v3", num_nextn_predict_layers=1), seed=0)
    assert MTP in reader.names
