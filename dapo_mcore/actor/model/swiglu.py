"""The SwiGLU of Megatron's MLPs: dapo_mcore.kernels.swiglu, in place of megatron-core's own (fusions/fused_bias_swiglu.py).

Change here: when a new megatron-core version calls a SwiGLU from another module. Dense MLPs, experts and shared experts, local
ones and Transformer Engine's, all call it by the two names below if `bias_activation_fusion` is set (transformer_config.py).
So a CPU and a GPU take the same path. On a CPU the bits are those of the unfused formula in megatron-core's MLP.
"""

from __future__ import annotations

import torch
from megatron.core.transformer import mlp
from megatron.core.transformer.moe import experts, shared_experts
from torch import Tensor

from dapo_mcore.kernels.swiglu import swiglu

CALLERS = (mlp, experts, shared_experts)


def use_own_swiglu() -> None:
    """Let all modules of megatron-core that compute a SwiGLU call the functions below."""
    for module in CALLERS:
        for function in (bias_swiglu_impl, weighted_bias_swiglu_impl):
            if hasattr(module, function.__name__):
                setattr(module, function.__name__, function)


def bias_swiglu_impl(
    x: Tensor, bias: Tensor | None, fp8_input_store: bool = False, cpu_offload_input: bool = False
) -> Tensor:
    """Return silu(gate) · up [..., F] of `x` + `bias` [..., 2·F]; the gate comes first.

    fp8_input_store    keeps the input for the backward pass in e4m3 (megatron.activation_func_fp8_input_store).
    cpu_offload_input  marks it for Transformer Engine's activation offloading (megatron.cpu_offloading).
    """
    return _swiglu(x, bias, None, fp8_input_store, cpu_offload_input)


def weighted_bias_swiglu_impl(x: Tensor, bias: Tensor | None, weights: Tensor, fp8_input_store: bool = False) -> Tensor:
    """Return bias_swiglu_impl times `weights` [tokens, 1], the probabilities of an expert's tokens, in the dtype of `x`."""
    return _swiglu(x, bias, weights, fp8_input_store, False)


def _swiglu(x: Tensor, bias: Tensor | None, weights: Tensor | None, fp8_store: bool, offload: bool) -> Tensor:
    rows = (x if bias is None else x + bias).flatten(0, -2)
    if offload:
        rows.activation_offloading = True  # Transformer Engine looks for it when autograd keeps a tensor
    y = swiglu(rows, weights, saved_dtype=torch.float8_e4m3fn if fp8_store else None)
    return y.unflatten(0, x.shape[:-1])
