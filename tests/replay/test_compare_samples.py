from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from dapo_mcore.replay.compare import Check, Terms, Verdict
from dapo_mcore.replay.compare_samples import compare_prompts, compare_samples
from dapo_mcore.replay.record import BatchRecord, PromptRecord
from tests.replay.planted import PROMPT_TOKENS, SIZE, batch_record, in_batch, step_record

EXACT = Terms(same_layout=True, exact=True, rounding=1e-4)
ROUNDS = replace(EXACT, exact=False)
PROMPTS = step_record(1).prompts


def checks(other: BatchRecord, terms: Terms = EXACT) -> dict[str, Check]:
    return {check.name: check for check in compare_samples(PROMPTS, batch_record(1), other, terms)}


def test_equal_samples_have_equal_checks_in_causal_order():
    found = checks(batch_record(1))
    names = ["requests", "weight versions", "tokens", "rollout log-probs", "rewards", "loss mask"]
    assert list(found) == names and {check.verdict for check in found.values()} == {Verdict.EQUAL}


def test_another_set_of_prompts_is_told_from_another_order():
    others = [*PROMPTS[:2], PromptRecord("new", "train.jsonl row 9"), PROMPTS[3]]
    check = compare_prompts(PROMPTS, others)
    assert check.detail == "number 3 of 4: uid12 (train.jsonl row 3) against new (train.jsonl row 9); 3 are in both"
    assert check.place == {"prompt": 2, "values": ["uid12", "new"], "in_both": 3}
    assert compare_prompts(PROMPTS, PROMPTS[:3]).detail.startswith(
        "number 4 of 4: uid13 (train.jsonl row 4) against none"
    )
    assert compare_prompts(PROMPTS, PROMPTS[::-1]).detail.startswith("the same 4 in another order, from number 1 on")


def test_a_group_of_another_size_ends_the_comparison():
    record = batch_record(1)
    groups = np.array([0, 0, 1, 1, 1, 2, 3, 3])
    (check,) = compare_samples(PROMPTS, record, replace(record, batch=replace(record.batch, group_ids=groups)), EXACT)
    assert (check.name, check.detail) == ("requests", "prompt uid11 has 2 responses against 3")


def test_a_longer_response_differs_where_the_other_one_ends():
    """Its sample's tokens are equal until there, and the samples after it are compared at their own positions."""
    record = batch_record(1)
    batch, end = record.batch, int(record.batch.offsets[3])
    longer = replace(
        batch,
        tokens=np.insert(batch.tokens, end, 9),
        loss_mask=np.insert(batch.loss_mask, end, True),
        rollout_logprobs=np.insert(batch.rollout_logprobs, end, -1),
        offsets=batch.offsets + (np.arange(len(batch.offsets)) >= 3),
    )
    found = checks(replace(record, batch=longer))
    length = int(np.diff(batch.offsets)[2])
    assert found["tokens"].detail == f"sample 2 (train.jsonl row 2, response 1 of 2), token {length}: its end against 9"
    assert found["rollout log-probs"].verdict is Verdict.EQUAL
    loss = length - PROMPT_TOKENS
    assert found["loss mask"].detail.endswith(f"{loss} loss tokens against {loss + 1}")


def test_a_token_of_tool_output_that_differs_is_told_from_one_of_the_policy():
    """Another tool output explains all that follows; another token of the policy does not."""
    place = int(batch_record(1).batch.offsets[4]) + PROMPT_TOKENS + 1
    record = in_batch("loss_mask", place, False)(batch_record(1))
    for position, told in ((place - 1, ""), (place, " (tool output)"), (place + 1, "")):
        other = in_batch("tokens", position, 0)(record)
        check = {check.name: check for check in compare_samples(PROMPTS, record, other, EXACT)}["tokens"]
        at = position - int(record.batch.offsets[4])
        assert check.detail.startswith(f"sample 4 (train.jsonl row 3, response 1 of 2), token {at}{told}: ")


def test_masks_of_as_many_tokens_differ_at_the_first_that_only_one_has():
    """A tool's output that begins one token later in one of the runs, and ends one token later."""
    record = batch_record(1)
    start = int(record.batch.offsets[4]) + PROMPT_TOKENS
    one, other = (in_batch("loss_mask", start + 1 + late, False)(record) for late in (0, 1))
    check = {check.name: check for check in compare_samples(PROMPTS, one, other, EXACT)}["loss mask"]
    count = int(one.batch.num_loss_tokens[4])
    told = f"from token {PROMPT_TOKENS + 1}: {count} loss tokens against {count}"
    assert check.verdict is Verdict.DIFFERS and check.detail == f"sample 4 (train.jsonl row 3, response 1 of 2), {told}"
    assert check.place == {"sample": 4, "position": PROMPT_TOKENS + 1, "values": [count, count]}


def test_only_log_probs_of_equal_tokens_are_compared_and_the_largest_difference_is_told():
    record = batch_record(1)
    start = int(record.batch.offsets[5])
    other = in_batch("tokens", start + 4, 0)(record)
    other = in_batch("rollout_logprobs", start + 5, -50)(other)  # after a token that differs
    other = in_batch("rollout_logprobs", start + 3, record.batch.rollout_logprobs[start + 3] - 2e-5)(other)
    other = in_batch("rollout_logprobs", 3, record.batch.rollout_logprobs[3] - 1e-5)(other)
    check = checks(other, ROUNDS)["rollout log-probs"]
    assert check.verdict is Verdict.ROUNDING and check.size == pytest.approx(2e-5, rel=0.01)
    assert (check.place["sample"], check.place["position"]) == (5, 3) and "2 of 8 samples differ" in check.detail
    assert checks(other)["rollout log-probs"].verdict is Verdict.DIFFERS


def test_a_response_that_ends_for_another_reason_is_a_difference_of_tokens():
    check = checks(in_batch("finish_reasons", 7, 1)(batch_record(1)))["tokens"]
    assert check.detail == f"sample 7 (train.jsonl row 4, response {SIZE} of {SIZE}): end stop against length"


def test_nan_rewards_are_equal_and_the_sign_of_zero_is_not():
    record = in_batch("rewards", 0, np.nan)(batch_record(1))
    found = {check.name: check for check in compare_samples(PROMPTS, record, record, EXACT)}
    assert found["rewards"].verdict is Verdict.EQUAL
    check = checks(in_batch("penalties", 0, -0.0)(batch_record(1)))["rewards"]
    assert check.place["values"] == {"penalty": [0.0, -0.0]}


@pytest.mark.bench
def bench_a_step_of_the_target_size(capsys):
    """8,192 samples of 20,480 tokens: 168 million tokens, of which the last one differs."""
    samples, length = 8192, 20480
    total, numbers = samples * length, np.arange(samples)
    small = batch_record(1)
    batch = replace(
        small.batch,
        tokens=np.ones(total, np.int32),
        loss_mask=np.ones(total, bool),
        rollout_logprobs=np.full(total, -1, np.float32),
        offsets=np.arange(samples + 1) * length,
        rewards=np.ones(samples),
        group_ids=numbers // 16,
        in_statistics=np.ones(samples, bool),
    )
    per_sample = {name: np.zeros(samples, np.int64) for name in ("seeds", "weight_versions", "finish_reasons")}
    per_span = {"span_samples": numbers, "span_starts": numbers * 0, "span_versions": numbers * 0}
    floats = {"scores": np.ones(samples), "penalties": np.zeros(samples), "accs": np.ones(samples, bool)}
    record = BatchRecord(batch, replace(small.origins, **per_sample, **per_span, **floats))
    other = in_batch("tokens", -1, 2)(record)
    prompts = [PromptRecord(f"uid{n}", f"row {n}") for n in range(samples // 16)]
    start = time.perf_counter()
    found = list(compare_samples(prompts, record, other, EXACT))
    with capsys.disabled():
        print(f"\n{total:,} tokens: {time.perf_counter() - start:.1f} s; {found[2].detail}")
    assert found[2].place["position"] == length - 1
