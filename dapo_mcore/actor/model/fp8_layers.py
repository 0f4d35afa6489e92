"""The linear layers' products with FP8 operands, simulated: operands are quantized, and the product is computed in fp32.

Change here: how each operand is quantized, and in which layers. For a layer with input X [T, in], weight W
[out, in] and output gradient dY [T, out], Transformer Engine (v2.11, pytorch/module/linear.py) computes

    forward            Y  = X · Wᵀ      tiles of both along `in`
    input gradient     dX = dY · W      tiles of both along `out`
    weight gradient    dW = dYᵀ · X     tiles of both along the tokens

Codes and scales are Transformer Engine's, bit for bit; sums may differ in the last bits, because their order differs. The head, the embedding,
attention, norms and the router stay as they are, as on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from dapo_mcore.actor.model.fp8_numbers import Quantized, quantize_mx, quantize_tensor, quantize_tiles
from dapo_mcore.actor.model.fp8_rules import has_power_of_two_scales
from dapo_mcore.actor.model.latent import ReplicatedLinear

_BLOCK, _MX_BLOCK = 128, 32


@dataclass(frozen=True)
class Quantizer:
    """How a recipe represents the operands of the three products.

    recipe           blockwise, tensorwise or mxfp8.
    gradient         float8 dtype of dY; X and W are e4m3.
    power_of_two     True if scales are rounded to powers of two; those of mxfp8 always are.
    """

    recipe: str
    gradient: torch.dtype
    power_of_two: bool

    def weight(self, matrix: torch.Tensor, along: int) -> Quantized:
        """Return W for a product that sums over dim `along`."""
        if self.recipe == "blockwise":
            square = (_BLOCK, _BLOCK)
            return quantize_tiles(matrix, torch.float8_e4m3fn, square, power_of_two=self.power_of_two)
        return self._operand(matrix, torch.float8_e4m3fn, along)

    def activation(self, matrix: torch.Tensor, along: int) -> Quantized:
        """Return X for a product that sums over dim `along`."""
        return self._operand(matrix, torch.float8_e4m3fn, along)

    def output_gradient(self, matrix: torch.Tensor, along: int) -> Quantized:
        """Return dY for a product that sums over dim `along`."""
        return self._operand(matrix, self.gradient, along)

    def _operand(self, matrix: torch.Tensor, dtype: torch.dtype, along: int) -> Quantized:
        if self.recipe == "tensorwise":
            return quantize_tensor(matrix, dtype, power_of_two=self.power_of_two)
        size = _BLOCK if self.recipe == "blockwise" else _MX_BLOCK
        tile = (1, size) if along == 1 else (size, 1)
        if self.recipe == "blockwise":
            return quantize_tiles(matrix, dtype, tile, power_of_two=self.power_of_two)
        return quantize_mx(matrix, dtype, tile)


def quantizer(recipe: str, fmt: str) -> Quantizer:
    """Return the quantizer of a recipe and format (e4m3, or hybrid: e5m2 for gradients)."""
    gradient = torch.float8_e5m2 if fmt == "hybrid" else torch.float8_e4m3fn
    return Quantizer(recipe, gradient, power_of_two=has_power_of_two_scales(recipe))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, fp8: Quantizer) -> torch.Tensor:
        tokens = hidden.reshape(-1, hidden.size(-1))
        ctx.save_for_backward(tokens, weight)
        ctx.fp8, ctx.shape = fp8, hidden.shape
        product = fp8.activation(tokens, along=1).values() @ fp8.weight(weight, along=1).values().T
        return product.to(hidden.dtype).view(*hidden.shape[:-1], weight.size(0))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        tokens, weight = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.size(-1))
        fp8: Quantizer = ctx.fp8
        to_input = fp8.output_gradient(gradient, along=1).values() @ fp8.weight(weight, along=0).values()
        to_weight = fp8.output_gradient(gradient, along=0).values().T @ fp8.activation(tokens, along=0).values()
        return to_input.to(tokens.dtype).view(ctx.shape), to_weight.to(weight.dtype), None


def fp8_product(hidden: torch.Tensor, weight: torch.Tensor, fp8: Quantizer) -> torch.Tensor:
    """Return hidden [..., in] times the transposed weight [out, in], with FP8 operands in all three products."""
    return _Product.apply(hidden, weight, fp8)


def simulate(layers: torch.nn.ModuleList, fp8: Quantizer, bf16_layers: frozenset[int]) -> None:
    """Compute the products of Megatron's local `layers` in simulated FP8, except in layers whose index is in `bf16_layers`.

    The index is a layer's place in the whole model, from 0.
    """
    for layer in layers:
        if layer.layer_number - 1 in bf16_layers:
            continue
        for module in layer.modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                module._forward_impl = partial(_parallel_product, fp8=fp8)
            elif isinstance(module, ReplicatedLinear):
                module.product = partial(fp8_product, fp8=fp8)


def _parallel_product(
    *,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group: Any,
    fp8: Quantizer,
    **_: Any,
) -> torch.Tensor:
    """Take the place of `_forward_impl` in megatron-core's parallel linear layers (0.16.1 to 0.19.2).

    Collectives over `tp_group`: a gather of the input under sequence parallelism, and in the backward pass the sum of its
    gradient. So after the gather a scale covers the tokens of all ranks.
    """
    if sequence_parallel:
        input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
    elif allreduce_dgrad:
        input = copy_to_tensor_model_parallel_region(input, group=tp_group)
    product = fp8_product(input, weight, fp8)
    return product if bias is None else product + bias
