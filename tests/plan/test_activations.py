"""Bytes that a layer keeps per token, by hand from the shapes of well-known models."""

from __future__ import annotations

from typing import Any

import pytest

from dapo_mcore.plan.activations import kv_bytes_per_token, layer_bytes
from tests.plan.jobs import job

DENSE = 4 * 2 * 5120 + 2 * 7168 + 2 * 6144 + 2 * 5120 + 4 * 40 + 6 * 27648
"""Of Qwen2.5-32B in bf16: input, residual and two norms; q, k, v; rotated q and k; attention's output and sums; the MLP."""

ALONE: dict[str, Any] = {"parallel": {}, "model__recompute": "none"}


def test_a_dense_layer_by_hand() -> None:
    assert layer_bytes(job(**ALONE), 0).kept == DENSE
    assert layer_bytes(job(**ALONE), 0).working == 4 * (27648 + 5120)


def test_tensor_parallelism_divides_norms_only_with_sequence_parallelism() -> None:
    assert layer_bytes(job(model__recompute="none"), 0).kept == DENSE / 8
    without = layer_bytes(job(model__recompute="none", parallel__sequence_parallel=False), 0)
    assert without.kept == DENSE / 8 + 4 * 2 * 5120 * 7 / 8


def test_key_value_heads_are_not_divided_below_one() -> None:
    """Qwen2.5-1.5B has 2: on 4 ranks each has one, twice in all."""
    split = {"parallel__tensor_parallel": 4, "parallel__pipeline_parallel": 1, "rollout__sglang__tensor_parallel": 1}
    four = job("Qwen2.5-1.5B", nodes=1, rollout__sglang__num_servers=8, model__recompute="none", **split)
    kept = 4 * 2 * 1536 / 4 + 2 * (384 + 2 * 128) + 2 * (384 + 128) + 2 * 384 + 4 * 12 / 4 + 6 * 8960 / 4
    assert layer_bytes(four, 0).kept == kept
    assert kv_bytes_per_token(four.shape, 2, 4) == 2 * 28 * 2 * 128


@pytest.mark.parametrize(
    ("recompute", "kept", "recomputed"),
    [
        ("full", 2 * 5120, DENSE - 2 * 5120),
        ("selective", DENSE, 0),
        (["core_attn"], DENSE, 0),
        (["mlp"], DENSE - 6 * 27648, 6 * 27648),
    ],
)
def test_recomputation_drops_what_it_computes_again(recompute: Any, kept: int, recomputed: int) -> None:
    found = layer_bytes(job(**ALONE | {"model__recompute": recompute}), 0)
    assert (found.kept, found.working) == (kept, recomputed + 4 * (27648 + 5120))


def test_fp8_keeps_inputs_of_products_in_one_byte_and_attentions_output_in_both() -> None:
    fp8 = job(**ALONE, model__fp8={"recipe": "tensorwise", "first_last_bf16": 1})
    assert layer_bytes(fp8, 0).kept == DENSE
    assert layer_bytes(fp8, 1).kept == DENSE - 2 * 5120 - 27648 + 5120


def test_a_layer_with_experts_counts_the_tokens_of_its_busiest_rank() -> None:
    """Qwen3-30B-A3B: 8 of 128 experts of 768 per token. Its dense size, 6,144, plays no part."""
    servers = {"rollout__sglang__num_servers": 2, "rollout__sglang__tensor_parallel": 8}
    moe = job("Qwen3-30B-A3B", nodes=2, **ALONE, **servers)
    rows = 8 * 1.2
    attention = 3 * 2 * 2048 + 2 * 5120 + 2 * 4608 + 2 * 4096 + 4 * 32
    experts = 2 * 2048 + 8 * 128 + 4 * rows * 2048 + 4 * rows * 768 + 2 * rows * 768
    assert layer_bytes(moe, 0).kept == pytest.approx(attention + experts)
    without = job("Qwen3-30B-A3B", nodes=2, **ALONE | {"model__recompute": ["moe_act"]}, **servers)
    assert layer_bytes(moe, 0).kept - layer_bytes(without, 0).kept == pytest.approx(2 * rows * 768)
    without = job("Qwen3-30B-A3B", nodes=2, **ALONE | {"model__recompute": ["moe"]}, **servers)
    assert layer_bytes(without, 0).kept == pytest.approx(attention + 2 * 2048)


def test_latent_attention_caches_its_latent_vector_and_can_drop_q_k_and_v() -> None:
    servers = {"rollout__sglang__num_servers": 4, "rollout__sglang__tensor_parallel": 8}
    deepseek = {"parallel": {"expert_parallel": 32}} | servers
    kept = layer_bytes(job("DeepSeek-V3", nodes=4, model__recompute="none", **deepseek), 0).kept
    dropped = layer_bytes(job("DeepSeek-V3", nodes=4, model__recompute=["mla_up_proj"], **deepseek), 0).kept
    assert kept - dropped == 2 * 128 * (2 * 192 + 128)
    assert kv_bytes_per_token(job("DeepSeek-V3", nodes=4, **deepseek).shape, 2, 8) == 2 * 61 * (512 + 64)
