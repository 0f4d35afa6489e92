"""Groups as flat arrays: offsets, masks and statistics."""

from dataclasses import replace

import numpy as np
import pytest

from dapo_mcore.algo.loss import sample_weights
from dapo_mcore.batch.collate import select, to_train_batch
from dapo_mcore.errors import DataError, RewardError
from dapo_mcore.types import Group, Prompt, Rollout, Sample, Score


def make_sample(tokens, mask=None, finish="stop", reward=1.0, masked=False, pred=""):
    mask = np.ones(len(tokens), bool) if mask is None else np.array(mask, bool)
    logprobs = -np.arange(1, len(tokens) + 1, dtype=np.float32)
    rollout = Rollout(np.array(tokens, np.int32), logprobs, mask, finish, 0)
    failure = "timeout" if masked else None
    return Sample(rollout, "", Score(reward, reward, reward > 0, pred, failure=failure, masked=masked))


def make_group(uid, prompt, *samples):
    return Group(Prompt(uid, np.array(prompt, np.int32), "", ""), samples)


GROUPS = [
    make_group("train:9", [1, 2], make_sample([3, 4, 5], mask=[1, 0, 1]), make_sample([6], finish="length", reward=-1)),
    make_group(
        "train:4",
        [7],
        make_sample([8, 9], masked=True, reward=float("nan")),
        make_sample([10], finish="abort"),
        make_sample([], reward=0.5),
    ),
]


def test_flat_layout():
    batch = to_train_batch(GROUPS, overlong_filter=False)
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 1, 2, 6, 7, 8, 9, 7, 10, 7]
    assert batch.offsets.tolist() == [0, 5, 8, 11, 13, 14]
    assert np.flatnonzero(batch.loss_mask).tolist() == [2, 4, 7]
    assert batch.rollout_logprobs[[2, 3, 4, 7]].tolist() == [-1, 0, -3, -1]
    assert batch.group_ids.tolist() == [0, 0, 1, 1, 1]
    assert batch.rewards[[0, 1, 3, 4]].tolist() == [1, -1, 1, 0.5]
    assert batch.num_loss_tokens.tolist() == [2, 1, 0, 0, 0]
    kinds = {name: getattr(batch, name).dtype.name for name in ("tokens", "loss_mask", "rollout_logprobs", "offsets")}
    assert kinds == {"tokens": "int32", "loss_mask": "bool", "rollout_logprobs": "float32", "offsets": "int64"}


def test_failed_and_aborted_samples_leave_statistics_and_loss():
    batch = to_train_batch(GROUPS, overlong_filter=False)
    assert batch.in_statistics.tolist() == [True, True, False, False, True]
    assert not batch.rollout_logprobs[8:].any()


def test_overlong_filter_takes_truncated_samples_out_of_the_loss_only():
    batch = to_train_batch(GROUPS, overlong_filter=True)
    assert np.flatnonzero(batch.loss_mask).tolist() == [2, 4]
    assert batch.rollout_logprobs[7] == 0
    assert batch.in_statistics.tolist() == [True, True, False, False, True]


VOID = [
    make_group(
        "train:1",
        [1],
        make_sample([3, 4], pred="7"),
        make_sample([5], reward=-1),
        make_sample([6, 7], mask=[0, 0], reward=-1, pred="8"),
        make_sample([8], reward=-1, pred="[INVALID]", finish="length"),
        make_sample([9], reward=-1, pred="8"),
    )
]


def test_void_samples_leave_the_loss_only_if_the_filter_is_on():
    without, batch = (to_train_batch(VOID, overlong_filter=False, filter_void=on) for on in (False, True))
    assert without.num_loss_tokens.tolist() == [2, 1, 0, 1, 1]
    assert batch.num_loss_tokens.tolist() == [2, 0, 0, 0, 1]
    assert batch.rollout_logprobs.tolist() == [0, -1, -2, 0, 0, 0, 0, 0, 0, 0, 0, -1]
    assert batch.in_statistics.all() and batch.rewards.tolist() == [1, -1, -1, -1, -1]
    weights = sample_weights("seq-mean-token-mean", batch.num_loss_tokens)
    assert weights.tolist() == [1 / 4, 0, 0, 0, 1 / 2], "a void sample is no sequence of the mean"


def test_the_void_filter_needs_a_reward_function_that_names_answers():
    """Without names every wrong sample would be void, and training would see right ones only."""
    group = make_group("train:1", [1], make_sample([3]), make_sample([4], reward=-1))
    with pytest.raises(RewardError, match=r"names none for 1 of 1 right samples; let it return `pred`"):
        to_train_batch([group], overlong_filter=False, filter_void=True)


def test_a_little_credit_without_an_answer_is_void_and_needs_no_name():
    form = make_sample([3])
    form = replace(form, score=replace(form.score, acc=0.1))
    group = make_group("train:1", [1], form, make_sample([4], pred="8"))
    batch = to_train_batch([group], overlong_filter=False, filter_void=True)
    assert batch.num_loss_tokens.tolist() == [0, 1]


def test_select_keeps_order_and_group_numbers():
    part = select(to_train_batch(GROUPS, overlong_filter=False), [4, 0])
    assert part.tokens.tolist() == [7, 1, 2, 3, 4, 5]
    assert part.offsets.tolist() == [0, 1, 6]
    assert part.loss_mask.tolist() == [False, False, False, True, False, True]
    assert part.rollout_logprobs.tolist() == [0, 0, 0, -1, 0, -3]
    assert (part.group_ids.tolist(), part.rewards.tolist()) == ([1, 0], [0.5, 1])


def test_nothing_is_a_valid_batch():
    whole = to_train_batch(GROUPS, overlong_filter=False)
    for batch in (select(whole, []), to_train_batch([], overlong_filter=False)):
        assert (batch.num_samples, batch.offsets.tolist(), len(batch.tokens)) == (0, [0], 0)
        assert batch.num_loss_tokens.tolist() == []


def test_empty_prompt_is_refused():
    with pytest.raises(DataError, match=r"0 tokens.*add_bos"):
        to_train_batch([make_group("train:0", [], make_sample([1]))], overlong_filter=False)
