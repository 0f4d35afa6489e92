"""Times of gradient steps: those of the H100 table, and each part by hand."""

from __future__ import annotations

from typing import Any

import pytest

from dapo_mcore.plan.batch import batch_of
from dapo_mcore.plan.parameters import stage_counts
from dapo_mcore.plan.train_time import link, train_time
from tests.plan.h100 import ROWS, Row
from tests.plan.jobs import job


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_gradient_steps_and_scoring_take_as_long_as_on_an_h100(row: Row) -> None:
    found = train_time(row.job, row.batch)
    update, score = found.update.total, found.score.total
    print(f"{row.name}: {update:.3f} s predicted, {row.update_s} measured; scoring {score:.3f} s, {row.score_s}")
    assert update == pytest.approx(row.update_s, rel=0.15)
    assert score == pytest.approx(row.score_s, rel=0.15)


def test_flops_are_those_of_the_batch() -> None:
    paper = job()
    batch = batch_of(paper)
    tokens = batch.train_samples * batch.mean_sample
    found = train_time(paper, batch)
    # 6 FLOPs per parameter and token without the embedding, and attention's
    dense = 6 * tokens * (32_763_876_352 - 2 * 152064 * 5120)
    head = 6 * batch.train_samples * batch.mean_response * 152064 * 5120
    attention = 3 * 64 * 40 * 256 * batch.squares * batch.micro_batches * 8 * 16
    assert found.flops == pytest.approx(dense + head + attention, rel=1e-3)
    assert found.mfu(paper) == pytest.approx(found.flops / found.update_s / 128 / 989e12)


def test_the_bubble_is_one_micro_batch_per_other_stage_and_interleaving_divides_it() -> None:
    paper = job()
    batch = batch_of(paper)
    plain = train_time(paper, batch).update
    turns = job(parallel__virtual_pipeline_parallel=4)
    interleaved = train_time(turns, batch).update
    busy = plain.total - plain.bubble - plain.gradient_sum - plain.optimizer - 0.020
    assert plain.bubble == pytest.approx(busy / (batch.micro_batches * batch.imbalance))
    assert interleaved.bubble == pytest.approx(plain.bubble / 4, rel=0.05)  # it also sends more
    assert interleaved.messages > plain.messages


def test_messages_of_tensor_parallelism_by_hand() -> None:
    paper = job(parallel__pipeline_parallel=1)
    batch = batch_of(paper)
    found = train_time(paper, batch)
    per_layer = 2 * batch.tokens * 5120 * 7 / 8 / (0.7 * 450e9)
    assert found.update.messages == pytest.approx(64 * (4 + 6) * per_layer * batch.micro_batches * batch.imbalance)
    assert found.score.messages == pytest.approx(64 * 4 * per_layer * batch.micro_batches * batch.imbalance)
    assert (link(paper, 8), link(paper, 9)) == (0.7 * 450e9, 0.7 * 50e9)


def test_gradients_cross_the_network_once_and_overlap_hides_a_part() -> None:
    paper = job()
    counts = stage_counts(paper, 1)
    whole = train_time(paper, batch_of(paper)).update.gradient_sum
    assert whole == pytest.approx((4 + 2) * counts.dense * 7 / 8 / (0.7 * 50e9))
    hidden = job(parallel__overlap_grad_reduce=True, parallel__overlap_param_gather=True)
    assert train_time(hidden, batch_of(hidden)).update.gradient_sum == pytest.approx(0.2 * whole)
    near = job(nodes=1, parallel__tensor_parallel=4, parallel__pipeline_parallel=1, rollout__sglang__num_servers=2)
    assert train_time(near, batch_of(near)).update.gradient_sum < whole


@pytest.mark.parametrize(
    ("overrides", "scored", "references"),
    [
        ({}, 15, 0),
        ({"batch__epochs": 2}, 15, 0),
        ({"algo__old_logprobs": "rollout"}, 0, 0),
        ({"algo__kl": {"coef": 0.1, "place": "reward"}}, 16, 16),
    ],
)
def test_mini_batches_are_scored_by_the_learners_rule(overrides: dict[str, Any], scored: int, references: int) -> None:
    paper = job(**overrides)
    found = train_time(paper, batch_of(paper))
    assert (found.num_scored, found.num_references) == (scored, references)
    assert found.num_updates == 16 * paper.config.batch.epochs


def test_a_critic_costs_what_the_policy_does_without_its_head() -> None:
    plain, ppo = job(), job(algo__advantage="gae", batch__epochs=2)
    found, alone = train_time(ppo, batch_of(ppo)), train_time(plain, batch_of(plain))
    # the first stage has as many layers as the last one, and no head
    assert found.critic_update.head == 0 and found.critic_update.products == found.update.products
    assert found.critic_s == pytest.approx(32 * found.critic_update.total + 16 * found.critic_score.total)
    assert 0.8 * found.update.total < found.critic_update.total < found.update.total
    assert alone.critic_s == 0 and alone.update == found.update


def test_recomputation_costs_a_forward_pass_of_the_layers() -> None:
    full, none = (train_time(own, batch_of(own)).update for own in (job(), job(model__recompute="none")))
    assert none.recompute == 0
    assert full.recompute > full.products / 3
    assert full.products == none.products
    some = job(model__recompute=["mlp"])
    part = train_time(some, batch_of(some)).update.recompute
    assert 0 < part < full.recompute


def test_fp8_speeds_up_the_layers_products_only() -> None:
    plain, fp8 = job(), job(model__fp8={"recipe": "tensorwise"})
    batch = batch_of(plain)
    before, after = train_time(plain, batch).update, train_time(fp8, batch).update
    assert after.products == pytest.approx(before.products / 1.93)
    assert after.head == before.head and after.memory_traffic > before.memory_traffic


def test_divided_experts_gather_rows_and_sum_them() -> None:
    mesh = {"parallel__tensor_parallel": 4, "parallel__pipeline_parallel": 1}
    servers = {"rollout__sglang__num_servers": 2, "rollout__sglang__tensor_parallel": 8}
    divided = job("Qwen3-30B-A3B", nodes=2, **mesh, **servers)
    batch = batch_of(divided)
    tensor = 48 * 4 * 2 * batch.tokens * 2048 * 3 / 4 / (0.7 * 450e9)
    rows = 48 * 2 * 8 * 2 * batch.tokens / 4 * 2048 * 3 / (0.7 * 450e9)
    found = train_time(divided, batch).score.messages
    assert found == pytest.approx((tensor + rows) * batch.micro_batches * batch.imbalance)


def test_distributed_experts_exchange_tokens() -> None:
    servers = {"rollout__sglang__num_servers": 2, "rollout__sglang__tensor_parallel": 8}
    apart = job(
        "Qwen3-30B-A3B",
        nodes=2,
        parallel__tensor_parallel=1,
        parallel__pipeline_parallel=1,
        parallel__sequence_parallel=False,
        parallel__expert_parallel=8,
        **servers,
    )
    batch = batch_of(apart)
    sent = 8 * 2 * batch.tokens * 2048 * 7 / 8 * 1.2 / (0.7 * 450e9)
    assert train_time(apart, batch).score.messages == pytest.approx(
        48 * 2 * sent * batch.micro_batches * batch.imbalance
    )
