"""Record what Transformer Engine makes of small matrices with every FP8 recipe: codes, scales, the product and both gradients.

    python -m tools.gpu_check.fp8 FOLDER        # from the root of the repository; writes FOLDER/fp8.safetensors and fp8.json

Change here: the cases, and what is recorded. The simulation is compared with the record at once. To keep a record, copy
fp8.safetensors to tests/tools/recorded/; the tests then compare every later simulation with it. Without a GPU the simulation
records itself, as a rehearsal.

A quantized matrix [M, N] is recorded with its scales along the rows (tiles of one token) and along the columns (tiles of one
feature), whatever Transformer Engine's own layout: `codes` uint8 [M, N], and `factors` float32, one per tile.
"""

from __future__ import annotations

import dapo_mcore.process.environment  # noqa: F401  isort: skip  (before torch)

import json
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dapo_mcore.actor.model.fp8_layers import fp8_product, quantizer
from dapo_mcore.actor.model.fp8_rules import has_power_of_two_scales

Tensors = dict[str, torch.Tensor]
NUM_TOKENS, NUM_IN, NUM_OUT = 160, 288, 224
"""Whole tiles of 32, as mxfp8 needs, and none of 128."""
LARGEST_ERROR = 5e-3
"""‖Δ‖ / ‖product‖ that rounding to bf16 (0.0012) and another order of summation may cause. Codes and factors must be equal."""


@dataclass(frozen=True)
class Case:
    recipe: str
    format: str

    @property
    def name(self) -> str:
        return f"{self.recipe}-{self.format}"


CASES = (
    Case("tensorwise", "hybrid"),
    Case("tensorwise", "e4m3"),
    Case("blockwise", "e4m3"),
    Case("blockwise", "hybrid"),
    Case("mxfp8", "e4m3"),
)


class Source(Protocol):
    """Something that quantizes and multiplies. Operands are `hidden` X, `weight` W and `gradient` dY, in bf16."""

    name: str

    def missing(self, case: Case) -> str:
        """Return why the case cannot run, or an empty text."""
        ...

    def quantized(self, case: Case, operand: str, matrix: torch.Tensor) -> Tensors:
        """Return `rows/codes`, `rows/factors` and, where the source has them, `columns/codes` and `columns/factors`."""
        ...

    def products(self, case: Case, operands: Tensors) -> Tensors:
        """Return `output` X · Wᵀ, `hidden_gradient` dY · W and `weight_gradient` dYᵀ · X, in bf16."""
        ...


class Simulation:
    """The simulation of actor/model/fp8_layers.py."""

    name = "simulation"

    def missing(self, case: Case) -> str:
        return ""

    def quantized(self, case: Case, operand: str, matrix: torch.Tensor) -> Tensors:
        fp8, found = quantizer(case.recipe, case.format), {}
        quantize = {"hidden": fp8.activation, "weight": fp8.weight, "gradient": fp8.output_gradient}[operand]
        for direction, along in (("rows", 1), ("columns", 0)):
            result = quantize(matrix, along)
            found |= {f"{direction}/codes": result.codes.view(torch.uint8), f"{direction}/factors": result.factors}
        return found

    def products(self, case: Case, operands: Tensors) -> Tensors:
        hidden, weight = (operands[name].detach().clone().requires_grad_() for name in ("hidden", "weight"))
        output = fp8_product(hidden, weight, quantizer(case.recipe, case.format))
        return _with_gradients(output, operands["gradient"], hidden, weight)


class TransformerEngine:
    """Transformer Engine's quantizers and its Linear (written for 2.11)."""

    def __init__(self, device: str = "cuda"):
        import transformer_engine.pytorch as engine
        import transformer_engine_torch as extension
        from transformer_engine.common import recipe

        self.name, self._device = f"transformer-engine {_version('transformer-engine')}", device
        self._engine, self._extension, self._recipe = engine, extension, recipe

    def missing(self, case: Case) -> str:
        check = {
            "tensorwise": self._engine.is_fp8_available,
            "blockwise": self._engine.is_fp8_block_scaling_available,
            "mxfp8": self._engine.is_mxfp8_available,
        }[case.recipe]
        possible, reason = check(return_reason=True)
        return "" if possible else reason or "not available"

    def quantized(self, case: Case, operand: str, matrix: torch.Tensor) -> Tensors:
        kinds = self._extension.DType
        kind = kinds.kFloat8E5M2 if operand == "gradient" and case.format == "hybrid" else kinds.kFloat8E4M3
        both: dict[str, Any] = dict(rowwise=True, columnwise=True)
        if case.recipe != "mxfp8":
            both["force_pow_2_scales"] = has_power_of_two_scales(case.recipe)
        if case.recipe == "tensorwise":
            made = self._engine.Float8CurrentScalingQuantizer(kind, torch.device(self._device), **both)
        elif case.recipe == "blockwise":
            made = self._engine.Float8BlockQuantizer(kind, block_scaling_dim=2 if operand == "weight" else 1, **both)
        else:
            made = self._engine.MXFP8Quantizer(kind, **both)
        with torch.no_grad():
            return _unpack(case.recipe, operand, made(matrix.to(self._device)), *matrix.shape)

    def products(self, case: Case, operands: Tensors) -> Tensors:
        operands = {name: matrix.detach().clone().to(self._device) for name, matrix in operands.items()}
        layer = self._engine.Linear(NUM_IN, NUM_OUT, bias=False, params_dtype=torch.bfloat16, device=self._device)
        with torch.no_grad():
            layer.weight.copy_(operands["weight"])
        hidden = operands["hidden"].requires_grad_()
        kinds = dict(tensorwise="Float8CurrentScaling", blockwise="Float8BlockScaling", mxfp8="MXFP8BlockScaling")
        chosen = getattr(self._recipe, kinds[case.recipe])(fp8_format=self._recipe.Format[case.format.upper()])
        with self._engine.autocast(enabled=True, recipe=chosen):
            output = layer(hidden)
        return _with_gradients(output, operands["gradient"], hidden, layer.weight)


def main(folder: Path) -> int:
    """Write the record and how the simulation differs from it. Return 1 if it does."""
    source: Source = TransformerEngine() if torch.cuda.is_available() else Simulation()
    path = folder / "fp8.safetensors"
    missing = record(source, path)
    row = {**versions(source), "missing": missing, "differences": compare(path)}
    (folder / "fp8.json").write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(row), flush=True)
    return int(bool(row["differences"]))


def record(source: Source, path: Path) -> dict[str, str]:
    """Write what the source makes of the operands to `path`. Return why cases are missing, by name."""
    inputs = operands()
    tensors = {f"operands/{name}": matrix for name, matrix in inputs.items()}
    missing = {case.name: reason for case in CASES if (reason := source.missing(case))}
    done = [case for case in CASES if case.name not in missing]
    for case in done:
        tensors |= {f"{case.name}/{name}": tensor.cpu() for name, tensor in _results(source, case, inputs).items()}
    notes = versions(source) | {"cases": json.dumps([[case.recipe, case.format] for case in done])}
    save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}, path, notes
    )
    return missing


def compare(path: Path) -> list[str]:
    """Return one line per recorded tensor that the simulation does not give."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
        cases = [Case(*fields) for fields in json.loads(file.metadata()["cases"])]
    inputs = {
        name.removeprefix("operands/"): matrix for name, matrix in tensors.items() if name.startswith("operands/")
    }
    lines = []
    for case in cases:
        ours = _results(Simulation(), case, inputs)
        theirs = {name: tensors[f"{case.name}/{name}"] for name in ours if f"{case.name}/{name}" in tensors}
        assert {"output", "hidden/rows/codes"} <= theirs.keys(), f"{path}: {case.name} is not complete"
        lines += [f"{case.name} {name}: {wrong}" for name in theirs if (wrong := _difference(ours[name], theirs[name]))]
    return lines


def operands() -> Tensors:
    """Return X, W and dY in bf16: features and tokens of unlike sizes, zero tokens, and tiles that are tiny but for one value."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    hidden = draw(NUM_TOKENS, NUM_IN) * torch.logspace(-2, 1, NUM_IN)
    gradient = draw(NUM_TOKENS, NUM_OUT) * torch.logspace(-7, -4, NUM_TOKENS)[:, None]
    hidden[5, 40], hidden[9] = 300.0, 0.0
    gradient[11:64] = 0.0
    gradient[100, :128] = 2e-38
    found = {"hidden": hidden, "weight": draw(NUM_OUT, NUM_IN) * 0.02, "gradient": gradient}
    return {name: matrix.bfloat16() for name, matrix in found.items()}


def versions(source: Source) -> dict[str, str]:
    """Return what made a record."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"source": source.name, "device": card, "torch": torch.__version__, "cuda": str(torch.version.cuda)}


def _results(source: Source, case: Case, inputs: Tensors) -> Tensors:
    found = source.products(case, inputs)
    for operand, matrix in inputs.items():
        found |= {f"{operand}/{name}": tensor for name, tensor in source.quantized(case, operand, matrix).items()}
    return found


def _with_gradients(
    output: torch.Tensor, gradient: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor
) -> Tensors:
    output.backward(gradient)
    return {"output": output.detach(), "hidden_gradient": hidden.grad, "weight_gradient": weight.grad}


def _unpack(recipe: str, operand: str, packed: Any, rows: int, columns: int) -> Tensors:
    """Return Transformer Engine's codes and scales in the record's layout.

    Its scales are padded, and stand as its matrix product reads them (pytorch/tensor/float8_blockwise_tensor.py and
    mxfp8_tensor.py): transposed for 1 × 128 tiles; as exponents for mxfp8, of which 0 stands for 0.
    """
    if recipe == "tensorwise":
        factor, transposed = packed._scale_inv.view(1, 1), packed._transpose
        found = {"rows/codes": packed._data, "rows/factors": factor}
        return found if transposed is None else found | {"columns/codes": transposed.T, "columns/factors": factor}
    along_rows, along_columns = packed._rowwise_scale_inv, packed._columnwise_scale_inv
    if recipe == "mxfp8":
        factors = along_rows[:rows, : columns // 32], along_columns[: rows // 32, :columns]
        codes = packed._rowwise_data, packed._columnwise_data
        factors = tuple(_from_e8m0(exponents) for exponents in factors)
    else:
        codes = packed._rowwise_data, packed._columnwise_data.T
        if operand == "weight":
            factors = along_rows[:, : -(-columns // 128)], along_columns[:, : -(-rows // 128)].T
        else:
            factors = along_rows[:, :rows].T, along_columns[:, :columns]
    names = ("rows/codes", "columns/codes", "rows/factors", "columns/factors")
    return dict(zip(names, (*codes, *factors), strict=True))


def _from_e8m0(exponents: torch.Tensor) -> torch.Tensor:
    factors = torch.exp2(exponents.float() - 127.0)
    return factors.masked_fill(exponents == 0, 0.0).masked_fill(exponents == 255, torch.nan)


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> str:
    """Return how two tensors differ, in numbers, or an empty text."""
    if ours.shape != theirs.shape:
        return f"{list(theirs.shape)} instead of {list(ours.shape)}"
    if theirs.dtype == torch.bfloat16:
        error = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
        return "" if error <= LARGEST_ERROR else f"off by {error:.2e}"
    count = int((ours != theirs).sum())
    return f"{count} of {ours.numel()} differ" if count else ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
