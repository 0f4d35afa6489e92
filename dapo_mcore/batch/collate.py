"""Groups of responses as flat arrays.

Change here: which tokens of a response are trained on. A sample that is not trained on stays in the batch without a loss
mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dapo_mcore.errors import DataError, RewardError
from dapo_mcore.types import Group, Sample, TrainBatch


def to_train_batch(groups: Sequence[Group], *, overlong_filter: bool, filter_void: bool = False) -> TrainBatch:
    """Return the samples of `groups`, in order, as one flat batch; group_ids are 0, 1, … in that order.

    A sample whose scoring failed or whose generation was aborted is left out of statistics and loss. A truncated sample
    is left out of the loss if `overlong_filter` is set (DAPO's overlong filtering), a void one if `filter_void` is; neither
    out of the statistics.
    Raise DataError for an empty prompt: the first response token could not be predicted from anything. With `filter_void`
    raise RewardError if a right sample has no answer: the reward function names none, so every wrong sample would be void.
    """
    if filter_void:
        _check_answers(groups)
    rows = [(group.prompt.token_ids, sample) for group in groups for sample in group.samples]
    offsets = _offsets(np.array([len(prompt) + len(sample.rollout.token_ids) for prompt, sample in rows], np.int64))
    batch = TrainBatch(
        tokens=np.empty(offsets[-1], np.int32),
        loss_mask=np.zeros(offsets[-1], bool),
        rollout_logprobs=np.zeros(offsets[-1], np.float32),
        offsets=offsets,
        rewards=np.array([sample.score.reward for _, sample in rows], np.float64),
        group_ids=np.repeat(np.arange(len(groups), dtype=np.int64), [len(group.samples) for group in groups]),
        in_statistics=np.array([sample.scored for _, sample in rows], bool),
    )
    for (prompt, sample), begin, end in zip(rows, offsets[:-1], offsets[1:]):
        if len(prompt) == 0:
            raise DataError("a prompt has 0 tokens, but at least 1 must precede a response; set data.add_bos true")
        left_out = (overlong_filter and sample.rollout.truncated) or (filter_void and sample.void)
        _write(batch, prompt, sample, slice(begin, end), trained=sample.scored and not left_out)
    return batch


def select(batch: TrainBatch, samples: Sequence[int] | np.ndarray) -> TrainBatch:
    """Return the given samples of `batch`, in the given order, as a new batch; group_ids keep their numbers."""
    samples = np.asarray(samples, dtype=np.int64)
    spans = [slice(batch.offsets[sample], batch.offsets[sample + 1]) for sample in samples]
    return TrainBatch(
        tokens=_join(batch.tokens, spans),
        loss_mask=_join(batch.loss_mask, spans),
        rollout_logprobs=_join(batch.rollout_logprobs, spans),
        offsets=_offsets(batch.lengths[samples]),
        rewards=batch.rewards[samples],
        group_ids=batch.group_ids[samples],
        in_statistics=batch.in_statistics[samples],
    )


def _check_answers(groups: Sequence[Group]) -> None:
    right = [sample for group in groups for sample in group.samples if sample.scored and sample.score.right]
    if unnamed := sum(not sample.score.answered for sample in right):
        raise RewardError(
            f"reward.filter_void leaves out samples without an answer, but the reward function names none for {unnamed} of "
            f"{len(right)} right samples; let it return `pred`, or set reward.filter_void false"
        )


def _write(batch: TrainBatch, prompt: np.ndarray, sample: Sample, span: slice, *, trained: bool) -> None:
    rollout = sample.rollout
    assert len(rollout.token_ids) == len(rollout.logprobs) == len(rollout.loss_mask), "ragged rollout"
    response = slice(span.start + len(prompt), span.stop)
    batch.tokens[span.start : response.start] = prompt
    batch.tokens[response] = rollout.token_ids
    if trained:
        batch.loss_mask[response] = rollout.loss_mask
        batch.rollout_logprobs[response] = np.where(rollout.loss_mask, rollout.logprobs, 0)


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _join(flat: np.ndarray, spans: list[slice]) -> np.ndarray:
    """Concatenate slices, without an index per token: a rollout step can have 10⁸ tokens."""
    return np.concatenate([flat[:0], *(flat[span] for span in spans)])
