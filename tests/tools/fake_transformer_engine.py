"""Transformer Engine's names, arguments and memory layouts (2.11), filled by the project's own simulation of FP8.

It lets code that calls Transformer Engine run on a CPU. It does not show that Transformer Engine computes the same.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from dapo_mcore.actor.model.fp8_layers import fp8_product, quantizer
from dapo_mcore.actor.model.fp8_numbers import Quantized, quantize_mx, quantize_tensor, quantize_tiles


class DType(Enum):
    kFloat8E4M3 = torch.float8_e4m3fn
    kFloat8E5M2 = torch.float8_e5m2


class Format(Enum):
    E4M3 = "e4m3"
    HYBRID = "hybrid"


class Recipe:
    name = ""

    def __init__(self, *, fp8_format: Format):
        self.fp8_format = fp8_format


class Float8CurrentScaling(Recipe):
    name = "tensorwise"


class Float8BlockScaling(Recipe):
    name = "blockwise"


class MXFP8BlockScaling(Recipe):
    name = "mxfp8"


class Float8CurrentScalingQuantizer:
    def __init__(
        self,
        fp8_dtype: DType,
        device: torch.device,
        *,
        rowwise: bool,
        columnwise: bool,
        force_pow_2_scales: bool = False,
    ):
        assert rowwise and columnwise
        self._dtype, self._power_of_two = fp8_dtype.value, force_pow_2_scales

    def __call__(self, matrix: torch.Tensor) -> SimpleNamespace:
        found = quantize_tensor(matrix, self._dtype, power_of_two=self._power_of_two)
        return SimpleNamespace(
            _data=_codes(found), _transpose=_codes(found).T.contiguous(), _scale_inv=found.factors.view(1)
        )


class Float8BlockQuantizer:
    def __init__(
        self,
        fp8_dtype: DType,
        *,
        rowwise: bool,
        columnwise: bool,
        force_pow_2_scales: bool = True,
        block_scaling_dim: int = 2,
    ):
        assert rowwise and columnwise
        self._dtype, self._power_of_two, self._dim = fp8_dtype.value, force_pow_2_scales, block_scaling_dim

    def __call__(self, matrix: torch.Tensor) -> SimpleNamespace:
        tiles = ((128, 128), (128, 128)) if self._dim == 2 else ((1, 128), (128, 1))
        rows, columns = (quantize_tiles(matrix, self._dtype, tile, power_of_two=self._power_of_two) for tile in tiles)
        along_rows, along_columns = rows.factors, columns.factors
        if self._dim == 1:
            along_rows = along_rows.T
        else:
            along_columns = along_columns.T
        return _packed(_codes(rows), _codes(columns).T, _padded(along_rows, 1, 4), _padded(along_columns, 1, 4))


class MXFP8Quantizer:
    def __init__(self, fp8_dtype: DType, *, rowwise: bool, columnwise: bool):
        assert rowwise and columnwise
        self._dtype = fp8_dtype.value

    def __call__(self, matrix: torch.Tensor) -> SimpleNamespace:
        rows, columns = (quantize_mx(matrix, self._dtype, tile) for tile in ((1, 32), (32, 1)))
        scales = (_padded(_exponents(rows), 128, 4), _padded(_exponents(columns), 4, 128))
        return _packed(_codes(rows), _codes(columns), *scales)


class Linear(torch.nn.Module):
    """A layer that keeps its weight in FP8 from the first micro-batch on (`is_first_microbatch` True) for those after it."""

    recipe: Recipe | None = None

    def __init__(self, in_features: int, out_features: int, *, bias: bool, params_dtype: torch.dtype, device: str):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(out_features, in_features, dtype=params_dtype, device=device))
        self._fp8_workspaces: dict[str, torch.Tensor] = {}

    def forward(self, hidden: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        assert Linear.recipe is not None
        numbers = quantizer(Linear.recipe.name, Linear.recipe.fp8_format.value)
        if is_first_microbatch is None:
            return fp8_product(hidden, self.weight, numbers)
        if is_first_microbatch or "weight" not in self._fp8_workspaces:
            self._fp8_workspaces["weight"] = numbers.weight(self.weight.detach(), along=1).values()
        return hidden.float() @ self._fp8_workspaces["weight"].T


@contextmanager
def autocast(*, enabled: bool, recipe: Recipe) -> Iterator[None]:
    Linear.recipe = recipe if enabled else None
    yield
    Linear.recipe = None


def install(monkeypatch: pytest.MonkeyPatch, **replaced: Any) -> None:
    """Make `import transformer_engine.pytorch` and its neighbours give this module's names, or those of `replaced`."""
    available = {
        f"is_{name}_available": lambda return_reason: (True, "") for name in ("fp8", "mxfp8", "fp8_block_scaling")
    }
    for name in ("transformer_engine", "transformer_engine.common"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name in ("transformer_engine.pytorch", "transformer_engine.common.recipe", "transformer_engine_torch"):
        module = ModuleType(name)
        vars(module).update(globals() | available | replaced)
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], module)


def _codes(found: Quantized) -> torch.Tensor:
    return found.codes.view(torch.uint8)


def _exponents(found: Quantized) -> torch.Tensor:
    exponents = torch.where(found.factors == 0, 0.0, found.factors.log2() + 127)
    return exponents.to(torch.uint8)


def _padded(scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return the scales with both dims rounded up to a multiple, and 7 in the rest."""
    return functional.pad(scales, (0, -scales.size(1) % columns, 0, -scales.size(0) % rows), value=7)


def _packed(rows: torch.Tensor, columns: torch.Tensor, along_rows: torch.Tensor, along_columns: torch.Tensor) -> Any:
    return SimpleNamespace(
        _rowwise_data=rows.contiguous(),
        _columnwise_data=columns.contiguous(),
        _rowwise_scale_inv=along_rows.contiguous(),
        _columnwise_scale_inv=along_columns.contiguous(),
    )
