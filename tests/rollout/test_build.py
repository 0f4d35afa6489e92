"""Where servers are placed beside the trainer; the engines themselves have tests of their own."""

from __future__ import annotations

import pytest

from dapo_mcore.config.sglang import SGLangConfig
from dapo_mcore.rollout.build import _placed


@pytest.mark.parametrize(
    ("given", "first"),
    [({}, 4), ({"colocated": True}, 0), ({"first_gpu": 6}, 6), ({"first_gpu": 0, "colocated": True}, 0)],
)
def test_servers_take_the_gpus_after_the_trainers_unless_they_share_or_are_told(given, first):
    assert _placed(SGLangConfig(**given), num_local_ranks=4).first_gpu == first
