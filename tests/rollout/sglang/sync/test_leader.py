"""A leader's answers to rank 0, without servers: buckets in order, errors of its stream, and a rank 0 that does not go on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dapo_mcore.errors import RolloutError
from dapo_mcore.rollout.sglang.sync.leader import Leader
from tests.rollout.sglang.leading import new_leader


@pytest.fixture
def leader() -> Iterator[Leader]:
    made = new_leader(timeout_s=5.0)
    yield made
    made.close()


def stream(*names: str, then: Exception | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    for name in names:
        yield name, torch.ones(2, dtype=torch.bfloat16)
    if then is not None:
        raise then


class Serving:
    """`serve` in a thread. `end` returns what it raised."""

    def __init__(self, leader: Leader, weights: Iterator[Any]):
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(leader, weights), daemon=True)
        self._thread.start()

    def _run(self, leader: Leader, weights: Iterator[Any]) -> None:
        try:
            leader.serve(weights)
        except Exception as error:
            self.error = error

    def end(self) -> Exception | None:
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self.error


def described(name: str, last: bool) -> dict[str, Any]:
    taken = ["a", "b", "c"]
    seen = {"a": taken[:2], "b": taken[2:], "c": []}[name]  # the stream is one tensor ahead of its buckets
    return {"tensors": [(name, "bfloat16", [2])], "last": last, "taken": [(other, [2]) for other in seen]}


def test_buckets_come_in_order_and_only_the_one_at_hand_can_be_sent(leader):
    serving = Serving(leader, stream("a", "b", "c"))
    assert leader.next_bucket(1, 0) == leader.next_bucket(1, 0) == described("a", False), "asked twice, sent once"
    assert leader.next_bucket(1, 1) == described("b", False)
    with pytest.raises(RolloutError, match="bucket 0 of sync 1 is gone"):
        leader.broadcast("weights-1", 1, 0)
    assert leader.next_bucket(1, 2) == described("c", True)
    leader.dismiss(1)
    assert serving.end() is None


def test_a_sync_that_rank_0_ends_early_is_drained_also_if_it_ends_before_it_begins(leader):
    left = stream("a", "b", "c")
    serving = Serving(leader, left)
    leader.next_bucket(1, 0)
    leader.dismiss(1)
    assert serving.end() is None and list(left) == []
    leader.dismiss(2)
    left = stream("a", "b")
    assert Serving(leader, left).end() is None and list(left) == []
    serving = Serving(leader, stream("a"))
    assert leader.next_bucket(3, 0)["last"], "an ended sync does not end the next"
    leader.dismiss(3)
    assert serving.end() is None


def test_an_error_of_the_stream_is_told_to_rank_0_and_raised_once_it_has_ended_the_sync(leader):
    serving = Serving(leader, stream("a", "b", then=ValueError("a rank is gone")))
    leader.next_bucket(1, 0)
    with pytest.raises(RolloutError, match=r"the weight stream broke off: ValueError\('a rank is gone'\)"):
        leader.next_bucket(1, 1)
    assert serving.error is None
    leader.dismiss(1)
    assert str(serving.end()) == "a rank is gone"


def test_a_rank_0_that_does_not_go_on_is_an_error(leader):
    leader._patience_s = 0.2
    error = Serving(leader, stream("a", "b")).end()
    assert str(error) == "rank 0 has not gone on with a weight sync for 0.2 s"
