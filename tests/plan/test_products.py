"""Products of layers: their FLOPs are those of architecture/flops.py, and narrow ones are slower."""

from __future__ import annotations

from typing import Any

import pytest

from dapo_mcore.plan.batch import batch_of
from dapo_mcore.plan.products import matrix_elements, product_seconds
from tests.plan.jobs import job

SERVERS: dict[str, Any] = {"rollout__sglang__num_servers": 4, "rollout__sglang__tensor_parallel": 8}


@pytest.mark.parametrize("model", ["Qwen2.5-32B", "Qwen3-30B-A3B", "Qwen1.5-MoE-A2.7B", "DeepSeek-V3"])
def test_the_kinds_together_are_the_models_flops(model: str) -> None:
    own = job(model, nodes=4, parallel={"expert_parallel": 4}, **SERVERS) if "32B" not in model else job()
    routed = own.architecture.fields.get("moe_router_topk", 0) / max(1, own.shape.num_experts)
    found = sum(
        2 * elements * (routed if kind == "experts" else 1)
        for moe in own.shape.moe_layers
        for kind, elements in matrix_elements(own.shape, moe).items()
    )
    assert found == pytest.approx(own.flops.per_token, rel=1e-9)


def test_a_dense_layer_by_hand() -> None:
    """Qwen2.5-32B on 8 tensor ranks: 640 query values and 3,456 inner values each."""
    paper = job()
    batch = batch_of(paper)
    attention, mlp = (5120 + 2 * 1024 + 5120) * 5120, 3 * 27648 * 5120
    rate = 0.75 * 989e12
    found = product_seconds(paper, batch, 0)
    assert found["attention"] == pytest.approx(2 * batch.tokens * attention / 8 / rate * (640 + 64) / 640)
    assert found["mlp"] == pytest.approx(2 * batch.tokens * mlp / 8 / rate * (3456 + 64) / 3456)
    wide = job(assumed={"narrow_values": 0})
    assert sum(product_seconds(wide, batch, 0).values()) == pytest.approx(
        2 * batch.tokens * (attention + mlp) / 8 / rate
    )


def test_experts_prefer_ranks_of_their_own_to_being_divided() -> None:
    """Qwen3-30B-A3B: on 8 ranks 16 experts of width 768 with 8 times the rows, or 128 experts of width 96."""
    mesh = {"parallel__tensor_parallel": 8, "parallel__pipeline_parallel": 1}
    apart = job(
        "Qwen3-30B-A3B", nodes=4, parallel__expert_parallel=8, assumed={"expert_imbalance": 1}, **mesh, **SERVERS
    )
    divided = job("Qwen3-30B-A3B", nodes=4, **mesh, **SERVERS)
    batch = batch_of(apart)
    own, other = (product_seconds(each, batch, 0) for each in (apart, divided))
    rows = batch.tokens / 8 * 8 * 8 / 128  # in both: all ranks gather the same tokens
    least = 2 * batch.tokens * 8 * 3 * 768 * 2048 / 8 / (0.75 * 989e12) * (rows + 64) / rows
    assert own["experts"] == pytest.approx(least * (768 + 64) / 768)
    assert other["experts"] == pytest.approx(least * (96 + 64) / 96)
    assert own["attention"] == other["attention"]
