from __future__ import annotations

import numpy as np
import pytest

from dapo_mcore.rollout.sampling.step import staleness_stats
from dapo_mcore.types import Group, Prompt, Rollout, Sample, Score


def sample(length: int, version: int, *spans: tuple[int, int]) -> Sample:
    ids = np.zeros(length, dtype=np.int32)
    rollout = Rollout(ids, np.zeros(length, np.float32), np.ones(length, bool), "stop", version, spans)
    return Sample(rollout, "", Score(1.0, 1.0, True))


def test_a_group_is_as_old_as_its_oldest_token_and_each_token_has_its_own_age() -> None:
    prompt = Prompt("train:0", np.zeros(1, np.int32), "", "")
    resumed = Group(prompt, (sample(10, 2, (0, 2), (4, 3), (9, 5)), sample(2, 5)))
    fresh = Group(prompt, (sample(3, 5), sample(5, 4)))
    # trained by version 6: 4 tokens of age 4, 5 of 3, 1 of 1; 2 of 1; 3 of 1; 5 of 2, over 20 tokens
    assert staleness_stats([resumed, fresh], trained=6) == {
        "sampling/staleness_mean": 3.0,
        "sampling/staleness_max": 4.0,
        "sampling/token_staleness_mean": pytest.approx((16 + 15 + 1 + 2 + 3 + 10) / 20),
        "sampling/samples_resumed": 1.0,
    }
