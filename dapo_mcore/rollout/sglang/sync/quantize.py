"""The weight stream in FP8, as SGLang reads a block-quantised checkpoint.

Change here: which tensors are quantised, and what the servers' config.json says of it. The arithmetic is
kernels/fp8_quant's. Source: Fp8Config and Fp8LinearMethod of SGLang 0.5.21, and DeepSeek-V3's checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dapo_mcore.errors import ConfigError
from dapo_mcore.kernels.fp8_quant import quantize_blocks

BLOCK = 128
_CACHE_SCALES = {
    "Qwen2ForCausalLM": ("attn.k_scale", "attn.v_scale"),
    "Qwen2MoeForCausalLM": ("attn.k_scale", "attn.v_scale"),
    "MixtralForCausalLM": ("attn.k_scale", "attn.v_scale"),
    "DeepseekV3ForCausalLM": ("attn_mqa.k_scale", "attn_mqa.v_scale", "attn_mha.k_scale", "attn_mha.v_scale"),
    "Qwen3ForCausalLM": (),
    "Qwen3MoeForCausalLM": (),
}
"""The architectures whose FP8 stream SGLang loads, with the scales of a layer's KV cache by the names that it takes. It drops
any other name without an error. () where its layers have none."""
_PROJECTION = re.compile(r".+(?:_proj|_proj_with_mqa|\.experts\.\d+\.w[123])\.weight")


def check_architecture(name: str) -> None:
    """Nothing; raises ConfigError where SGLang's loader drops part of the FP8 stream, and would generate with wrong weights.

    Its Llama class, which Mistral's is, looks for the scales of blocks under a name that no parameter has (0.5.15-0.5.23).
    """
    if name not in _CACHE_SCALES:
        raise ConfigError(
            f"rollout.sglang.quantize fp8 does not go with {name}: SGLang drops the scales of its FP8 blocks as it loads "
            f"them; set quantize none, which serves {name} in model.dtype ({', '.join(_CACHE_SCALES)} can be quantised)"
        )


def quantization_config() -> dict[str, Any]:
    """`quantization_config` of a config.json: SGLang then keeps projections in FP8 and everything else as it is.

    Activations are quantised by the server, one scale for each token and 128 channels.
    """
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}


def quantized(weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The stream with each projection as float8_e4m3fn [N, K] and `…weight_scale_inv`, fp32 [⌈N/128⌉, ⌈K/128⌉].

    Projections are the linear layers of attention, MLPs and experts. Embeddings, the head, norms, biases, routers and
    gates pass as they are.
    """
    for name, tensor in weights:
        if not _PROJECTION.fullmatch(name):
            yield name, tensor
            continue
        codes, scales = quantize_blocks(tensor, BLOCK)
        yield name, codes
        yield f"{name}_scale_inv", scales


def with_cache_scales(
    weights: Iterator[tuple[str, Tensor]], architecture: str, num_layers: int
) -> Iterator[tuple[str, Tensor]]:
    """The stream, then the scales of every layer's KV cache, 1.0 each, on the device of the last tensor before.

    For servers whose memory was released, where versions.py says that they need it.
    """
    device = torch.device("cpu")
    for name, tensor in weights:
        device = tensor.device
        yield name, tensor
    for layer in range(num_layers):
        for scale in _CACHE_SCALES[architecture]:
            yield f"model.layers.{layer}.self_attn.{scale}", torch.ones((), device=device)
