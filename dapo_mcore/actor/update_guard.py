"""Decides whether a gradient step is taken. It skips steps that are not finite and, as an option, spikes of the gradient norm.

Change here: the rules for a skip, and when skipped steps end the run. The rules read only numbers that are the same on every
rank, so all ranks decide the same without another collective.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from statistics import median

from dapo_mcore.config.optimizer import OptimizerConfig
from dapo_mcore.errors import TrainingError


class Verdict(Enum):
    """What happens to a gradient step. NEW_LEVEL is taken: it is one spike too many in a row to be a spike."""

    TAKEN = "taken"
    NEW_LEVEL = "taken at a new level"
    NOT_FINITE = "not finite"
    SPIKE = "spike"

    @property
    def skips(self) -> bool:
        """True if the step leaves the weights as they are."""
        return self in (Verdict.NOT_FINITE, Verdict.SPIKE)


@dataclass
class GuardState:
    """What the guard remembers of an optimizer's gradient steps, as a checkpoint stores it.

    num_updates        gradient steps, with skipped ones
    num_not_finite     skipped steps that were not finite, num_spikes skipped spikes
    not_finite_in_row, spikes_in_row   the same since the last step that was taken
    norms              gradient norms before clipping of the last steps that were taken, without 0; the oldest first
    """

    num_updates: int = 0
    num_not_finite: int = 0
    num_spikes: int = 0
    not_finite_in_row: int = 0
    spikes_in_row: int = 0
    norms: list[float] = field(default_factory=list)


class UpdateGuard:
    """Judges and counts the gradient steps of one optimizer.

    A spike is a norm above `spike_factor` times the median of the last `spike_window` norms. The median ignores outliers, and
    skipped steps do not enter it. Until it has `spike_window` norms, nothing is a spike. Skipped spikes never block a run: the
    max_skipped_updates-th in a row is taken, and the median begins anew with its norm.
    section  the optimizer's place in the configuration, for messages
    """

    def __init__(self, config: OptimizerConfig, section: str = "optimizer"):
        self.state, self._section = GuardState(), section
        self._limit, self._factor, self._window = config.max_skipped_updates, config.spike_factor, config.spike_window

    def judge(self, norm: float) -> Verdict:
        """Return what happens to a gradient step with this norm before clipping; NaN if anything in it was not finite.

        `norm` must be the same on every rank.
        """
        if not math.isfinite(norm):
            return Verdict.NOT_FINITE
        usual = self.usual_norm
        if usual is None or norm <= self._factor * usual:
            return Verdict.TAKEN
        return Verdict.SPIKE if self.state.spikes_in_row + 1 < self._limit else Verdict.NEW_LEVEL

    def add(self, verdict: Verdict, norm: float, cause: str = "") -> None:
        """Count a judged gradient step. Raise TrainingError at the last of max_skipped_updates steps that were not finite, if
        none was taken in between. `cause` is part of that message."""
        state = self.state
        state.num_updates += 1
        if verdict is Verdict.NOT_FINITE:
            state.num_not_finite += 1
            state.not_finite_in_row += 1
            if state.not_finite_in_row >= self._limit:
                raise TrainingError(self._why_it_ends(cause))
        elif verdict is Verdict.SPIKE:
            state.num_spikes += 1
            state.spikes_in_row += 1
        else:
            state.not_finite_in_row = state.spikes_in_row = 0
            before = [] if verdict is Verdict.NEW_LEVEL else state.norms
            if self._factor is not None and norm > 0:
                state.norms = [*before, norm][-self._window :]

    @property
    def usual_norm(self) -> float | None:
        """Return the median that spikes are measured by; None without `spike_factor` and as long as there are too few norms."""
        norms = self.state.norms[-self._window :]
        return median(norms) if self._factor is not None and len(norms) == self._window else None

    def describe_spike(self, norm: float) -> str:
        """Return `gradient norm 41.3 is 12.1 times the usual 3.4`; empty if there is no usual norm yet."""
        usual = self.usual_norm
        return "" if usual is None else f"gradient norm {norm:.3g} is {norm / usual:.3g} times the usual {usual:.3g}"

    def check_trained(self) -> None:
        """Raise TrainingError if there were gradient steps and all of them were skipped."""
        state = self.state
        if state.num_updates and state.num_not_finite + state.num_spikes == state.num_updates:
            raise TrainingError(
                f"all {state.num_updates} gradient steps of this run were skipped, since a number was not finite on some "
                f"rank: the weights are those of the start; {self._advice}"
            )

    def _why_it_ends(self, cause: str) -> str:
        count, spikes = self.state.not_finite_in_row, self.state.spikes_in_row
        which = f"{count} of the last {count + spikes} (the others were spikes)" if spikes else f"the last {count}"
        return (
            f"{which} gradient steps were skipped, since a number was not finite on some rank{cause and f' ({cause})'}, and "
            f"{self._section}.max_skipped_updates allows fewer than {self._limit} in a row; {self._advice}"
        )

    @property
    def _advice(self) -> str:
        policy = "actor/grad_norm, actor/ratio_max_deviation and mismatch/logprob_diff_max"
        metrics = policy if self._section == "optimizer" else "critic/grad_norm and critic/vf_loss"
        return (
            f"see {metrics} in metrics.jsonl for the steps before; lower {self._section}.lr, clip more "
            f"({self._section}.clip_grad) or look for NaN in the model's weights, and resume from a checkpoint from before the "
            f"first skipped step"
        )
