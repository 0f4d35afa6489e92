"""Gradient steps that were skipped."""

from __future__ import annotations

import pytest

from dapo_mcore.actor.skips import Skips
from dapo_mcore.errors import TrainingError


def test_skipped_steps_in_a_row_end_the_run_at_the_limit():
    skips = Skips(3)
    for skipped in (True, True, False, True, True):
        skips.add(skipped)
    with pytest.raises(TrainingError, match=r"last 3 gradient steps were skipped.*max_skipped_updates.*fewer than 3"):
        skips.add(True)


def test_a_run_that_only_skipped_has_not_trained():
    skips = Skips(10)
    skips.check_trained()  # a run without gradient steps, resumed at its end say
    skips.add(True)
    with pytest.raises(TrainingError, match="all 1 gradient steps of this run were skipped"):
        skips.check_trained()
    skips.add(False)
    skips.check_trained()
