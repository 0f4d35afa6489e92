"""The weight stream as SGLang's model classes load it: with an output projection of its own where they need one, and in FP8.

Change here: which classes need what, and which tensors are quantised. The arithmetic of FP8 is in kernels/fp8_quant; what the
servers' config.json says of it is in launch/servers.py. Sources: models/qwen2_moe.py, qwen3_moe.py, mixtral.py, Fp8Config and
Fp8LinearMethod of SGLang 0.5.21, and DeepSeek-V3's checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dapo_mcore.architecture.families import architecture_name
from dapo_mcore.errors import ConfigError
from dapo_mcore.kernels.fp8_quant import quantize_blocks
from dapo_mcore.rollout.sglang.launch.servers import FP8_BLOCK

_WITH_OWN_HEAD = frozenset({"MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"})
"""Classes that ignore tie_word_embeddings. Without a tensor for it, their head would keep the random values of the start."""
_CACHE_SCALES = {
    "Qwen2ForCausalLM": ("attn.k_scale", "attn.v_scale"),
    "Qwen2MoeForCausalLM": ("attn.k_scale", "attn.v_scale"),
    "MixtralForCausalLM": ("attn.k_scale", "attn.v_scale"),
    "DeepseekV3ForCausalLM": ("attn_mqa.k_scale", "attn_mqa.v_scale", "attn_mha.k_scale", "attn_mha.v_scale"),
    "Qwen3ForCausalLM": (),
    "Qwen3MoeForCausalLM": (),
}
"""Architectures whose FP8 stream SGLang loads, with the names of the KV cache's scales in each layer; () if it has none.
SGLang drops a tensor of any other name without an error."""
_PROJECTION = re.compile(r".+(?:_proj|_proj_with_mqa|\.experts\.\d+\.w[123])\.weight")


def as_served(
    weights: Iterator[tuple[str, Tensor]], hf_config: Any, tied: Mapping[str, str], quantize: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield a stream, or the part of it that one rank leads, as servers load it. tied  see `with_heads`."""
    stream = with_heads(weights, architecture_name(hf_config), tied)
    return quantized(stream) if quantize == "fp8" else stream


def with_heads(
    weights: Iterator[tuple[str, Tensor]], architecture: str, tied: Mapping[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the stream. If SGLang's class has an output projection of its own, each tied tensor follows its owner.

    tied  each name that shares another's storage, with the name of the owner, see WeightManifest.
    """
    if architecture not in _WITH_OWN_HEAD or not tied:
        yield from weights
        return
    for name, tensor in weights:
        if name in tied:
            continue
        yield name, tensor
        for other, owner in tied.items():
            if owner == name:
                yield other, tensor.clone()  # sync tensor gives a tensor's memory away


def check_architecture(name: str) -> None:
    """Raise ConfigError if SGLang's loader drops part of the FP8 stream, and would generate with wrong weights.

    Its Llama class, which also serves Mistral, looks for the scales of blocks under a name that no parameter has
    (0.5.15 to 0.5.23).
    """
    if name not in _CACHE_SCALES:
        raise ConfigError(
            f"rollout.sglang.quantize fp8 does not go with {name}: SGLang drops the scales of its FP8 blocks as it loads "
            f"them; set quantize none, which serves {name} in model.dtype ({', '.join(_CACHE_SCALES)} can be quantised)"
        )


def quantized(weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield each projection as float8_e4m3fn [N, K] and `…weight_scale_inv`, fp32 [⌈N/128⌉, ⌈K/128⌉]; the rest as it is.

    Projections are the linear layers of attention, MLPs and experts. Embeddings, the head, norms, biases, routers and gates
    are not quantised.
    """
    for name, tensor in weights:
        if not _PROJECTION.fullmatch(name):
            yield name, tensor
            continue
        codes, scales = quantize_blocks(tensor, FP8_BLOCK)
        yield name, codes
        yield f"{name}_scale_inv", scales


def with_cache_scales(
    weights: Iterator[tuple[str, Tensor]], architecture: str, num_layers: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield the stream, then 1.0 for each scale of every layer's KV cache, on the device of the stream's last tensor.

    For servers that have released memory, if their version needs it (versions.FIRST_WITH_LOST_SCALES).
    """
    device = torch.device("cpu")
    for name, tensor in weights:
        device = tensor.device
        yield name, tensor
    for layer in range(num_layers):
        for scale in _CACHE_SCALES[architecture]:
            yield f"model.layers.{layer}.self_attn.{scale}", torch.ones((), device=device)
