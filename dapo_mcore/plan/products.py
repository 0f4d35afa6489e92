"""The products of a layer's matrices on one rank: their FLOPs by kind, and what narrow matrices and few rows cost.

Change here: how the efficiency of a product depends on its shape. All FLOPs together are those of architecture/flops.py.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import cache

from dapo_mcore.architecture.mapping import Parameter, hf_shapes, layer_rules
from dapo_mcore.architecture.shape import WeightShape
from dapo_mcore.architecture.weight_rules import WeightRule
from dapo_mcore.plan.batch import Batch
from dapo_mcore.plan.job import Job

_KINDS = {"self_attention": "attention", "shared_experts": "shared_experts", "router": "router", "experts": "experts"}
"""By a part of a parameter's name; all other matrices are the MLP's."""


def product_seconds(job: Job, batch: Batch, layer: int) -> dict[str, float]:
    """Return the seconds of a layer's products in a forward pass over the mean micro-batch on one rank, by kind, in bf16."""
    rate = job.assume.gemm_efficiency * job.gpu.bf16_tflops * 1e12
    tokens, busiest = batch.tokens / job.context, expert_factor(job)
    routed = job.architecture.fields.get("moe_router_topk", 0) / max(1, job.shape.num_experts)
    found = {}
    for kind, elements in matrix_elements(job.shape, job.shape.moe_layers[layer]).items():
        flops = 2 * tokens * elements / job.tensor * (routed * busiest if kind == "experts" else 1)
        found[kind] = flops / rate / _efficiency(job, kind, tokens)
    return found


def expert_factor(job: Job) -> float:
    """Return how many more tokens than the mean the busiest rank's experts get."""
    return job.assume.expert_imbalance if job.config.parallel.expert_parallel > 1 else 1.0


@cache
def matrix_elements(shape: WeightShape, moe: bool) -> dict[str, int]:
    """Return the elements of the matrices of a layer with or without experts, by kind, on all ranks together."""
    found: Counter[str] = Counter()
    for rule in layer_rules(shape, shape.moe_layers.index(moe)):
        each = sum(math.prod(sizes) for sizes in hf_shapes(Parameter(rule), shape) if len(sizes) == 2)
        found[_kind(rule)] += each * (shape.num_experts if rule.per_expert else 1)
    return dict(found)


def _kind(rule: WeightRule) -> str:
    return next((kind for part, kind in _KINDS.items() if f".{part}." in rule.mcore[0]), "mlp")


def _efficiency(job: Job, kind: str, tokens: float) -> float:
    """Return the part of gemm_efficiency that a product reaches: n / (n + narrow_values) for its width, and for an expert's rows."""
    shape, parallel, narrow = job.shape, job.config.parallel, job.assume.narrow_values
    widths = {
        "attention": shape.num_heads * shape.head_dim / job.tensor,
        "mlp": shape.ffn_size / job.tensor,
        "shared_experts": shape.shared_ffn / job.tensor,
        "experts": shape.expert_ffn / parallel.expert_tensor_size,
    }
    if kind not in widths:
        return 1.0
    reached = widths[kind] / (widths[kind] + narrow)
    if kind == "experts":
        # an expert's ranks gather the tokens of all ranks that share the experts
        gathered = tokens / job.token_split * parallel.expert_parallel * parallel.expert_tensor_size
        rows = gathered * job.architecture.fields["moe_router_topk"] / shape.num_experts
        reached *= rows / (rows + narrow)
    return reached
