"""Bytes of activations that a layer keeps between its forward and its backward pass, per token of a context-parallel rank.

Change here: what a layer keeps, by module and recompute mode. Layers are Transformer Engine's: norms fused into the products
after them, fused attention, this project's SwiGLU. Names of modules are those of model.recompute.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dapo_mcore.actor.model.fp8_rules import bf16_layers
from dapo_mcore.architecture.shape import WeightShape
from dapo_mcore.plan.job import Job


@dataclass(frozen=True)
class LayerBytes:
    """Bytes per token of one layer.

    kept     from the forward to the backward pass
    working  more, while the layer's own backward pass runs: what it recomputes, and its gradients
    """

    kept: float
    working: float


def layer_bytes(job: Job, layer: int) -> LayerBytes:
    """Return the bytes of a layer with the job's recomputation and precision."""
    parts = _parts(job, layer)
    everything, given = sum(parts.values()), parts["input"]
    gradients = _gradients(job, layer)
    recompute = job.config.model.recompute
    if recompute == "none" or recompute == "selective":
        return LayerBytes(everything, gradients)
    if recompute == "full":
        return LayerBytes(given, everything - given + gradients)
    dropped = sum(_dropped(parts, module) for module in recompute)
    return LayerBytes(everything - dropped, dropped + gradients)


def _dropped(parts: Mapping[str, float], module: str) -> float:
    if module == "moe":
        return sum(parts.get(name, 0.0) for name in ("router", "dispatched", "experts", "moe_act", "shared_experts"))
    return parts.get(module, 0.0)


def _parts(job: Job, layer: int) -> dict[str, float]:
    """Return the bytes per token, named by the module of model.recompute that would drop them."""
    size, shape = job.dtype_bytes, job.shape
    fp8 = job.config.model.fp8
    operand = (
        1 if fp8 and layer not in bf16_layers(fp8, shape.num_layers) else size
    )  # a product's input, kept for its gradient
    hidden = shape.hidden_size / job.token_split
    parts = {"input": size * hidden, "residual": size * hidden}
    parts |= _latent(job, size, operand) if shape.key_rank else _attention(job, size, operand)
    if shape.moe_layers[layer]:
        return parts | _moe(job, size, operand)
    inner = shape.ffn_size / job.tensor
    return parts | {"norms": parts["norms"] + operand * hidden, "mlp": (2 * size + operand) * inner}


def _attention(job: Job, size: int, operand: int) -> dict[str, float]:
    shape, tensor = job.shape, job.tensor
    query = shape.num_heads * shape.head_dim / tensor
    key = max(shape.num_kv_heads / tensor, 1) * shape.head_dim
    output = size * query + (operand * query if operand < size else 0)  # FP8 keeps a copy for the output projection
    # the joint q, k, v stays alive as long as its view v; rotated q and k are new
    return {
        "norms": operand * shape.hidden_size / job.token_split,
        "attention": size * (query + 2 * key) + size * (query + key) + output + 4 * shape.num_heads / tensor,
    }


def _latent(job: Job, size: int, operand: int) -> dict[str, float]:
    shape, tensor, tokens = job.shape, job.tensor, job.token_split
    heads = shape.num_heads / tensor
    ranks = shape.query_rank + shape.key_rank
    down = (size * (ranks + shape.rope_dim) + operand * ranks) / tokens
    up = size * heads * (2 * shape.head_dim + shape.value_dim)
    rotated = size * heads * (shape.head_dim + shape.rope_dim)
    output = size * heads * shape.value_dim * (1.5 if operand < size else 1)
    return {
        "norms": operand * shape.hidden_size / tokens,
        "attention": down + rotated + output + 4 * heads,
        "mla_up_proj": up,
    }


def _moe(job: Job, size: int, operand: int) -> dict[str, float]:
    """Return the parts of a layer with experts, on the rank whose experts get most tokens."""
    shape, parallel = job.shape, job.config.parallel
    chosen = job.architecture.fields["moe_router_topk"] * job.assume.expert_imbalance
    shared = parallel.expert_tensor_size
    rows = chosen * shared / job.token_split
    inner = rows * shape.expert_ffn / shared
    return {
        "layernorm": size * shape.hidden_size / job.token_split,
        "router": 8 * shape.num_experts / job.token_split,
        "dispatched": (operand + size) * rows * shape.hidden_size,
        "experts": 2 * size * inner,
        "moe_act": operand * inner,
        "shared_experts": (2 * size + operand) * shape.shared_ffn / job.tensor,
    }


def _gradients(job: Job, layer: int) -> float:
    """Return the bytes per token of the gradients that are alive at once: those of the MLP's inner values and of its input."""
    shape, size = job.shape, job.dtype_bytes
    if shape.moe_layers[layer]:
        rows = job.architecture.fields["moe_router_topk"] * job.assume.expert_imbalance / job.token_split
        inner = rows * shape.expert_ffn + shape.shared_ffn / job.tensor
    else:
        inner = shape.ffn_size / job.tensor
    return 2 * size * (inner + shape.hidden_size / job.token_split)


def kv_bytes_per_token(shape: WeightShape, size: int, tensor: int) -> float:
    """Return the bytes of one token's KV cache on each GPU of a server. Latent attention keeps its latent vector, undivided."""
    if shape.key_rank:
        return size * shape.num_layers * (shape.key_rank + shape.rope_dim)
    return size * shape.num_layers * 2 * max(shape.num_kv_heads / tensor, 1) * shape.head_dim
