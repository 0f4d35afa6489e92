"""Gradient steps that were skipped because a gradient was not finite: counted, said, and in the end an error."""

from __future__ import annotations

from dapo_mcore.errors import TrainingError

_LOOK_AT = (
    "see actor/grad_norm, actor/ratio_max_deviation and mismatch/logprob_diff_max in metrics.jsonl for the steps before; "
    "lower optimizer.lr, clip more (optimizer.clip_grad) or look for NaN in the model's weights, and resume from a "
    "checkpoint from before the first skipped step"
)


class Skips:
    """Counts the gradient steps of one optimizer. Every rank sees the same steps, so all raise together.

    limit  that many skipped steps in a row are an error.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self.num_updates = self.num_skipped = self.num_in_row = 0

    def add(self, skipped: bool) -> None:
        """Count a step. Raises TrainingError at the last of `limit` skipped ones in a row."""
        self.num_updates += 1
        self.num_skipped += skipped
        self.num_in_row = self.num_in_row + 1 if skipped else 0
        if self.num_in_row >= self._limit:
            raise TrainingError(
                f"the last {self.num_in_row} gradient steps were skipped, since a gradient was not finite on some rank, and "
                f"optimizer.max_skipped_updates allows fewer than {self._limit} in a row; {_LOOK_AT}"
            )

    def check_trained(self) -> None:
        """Raise TrainingError if there were steps and all were skipped."""
        if self.num_updates and self.num_skipped == self.num_updates:
            raise TrainingError(
                f"all {self.num_updates} gradient steps of this run were skipped, since a gradient was not finite on some "
                f"rank: the weights are those of the start; {_LOOK_AT}"
            )
