"""Scores beside generation: their order, and what becomes of errors and of requests that nobody waits for any more."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest

from dapo_mcore.errors import RewardError, RolloutError
from dapo_mcore.rollout.sampling.scoring import Answer, ScoringQueue


class Scores:
    """A score that can be held up. Prompts and responses are strings here, and a sample is both joined.

    calls  the prompts of each call. `begun` is set when the first call begins; it ends after `go`.
    """

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, prompts: Sequence[Any], responses: Sequence[Any]) -> list[Any]:
        self.calls.append(list(prompts))
        self.begun.set()
        assert self.go.wait(10)
        if "bad" in prompts:
            raise RewardError("no score")
        return [prompt + response for prompt, response in zip(prompts, responses, strict=True)]


@pytest.fixture
def score() -> Scores:
    return Scores()


def follow(queue: ScoringQueue, *prompts: str) -> tuple[Answer, list[Any]]:
    """Return the answer to a request, and the list of events about it in the order in which they come."""
    answer, events = queue.follow(prompts, Future()), []
    answer.scored.add_done_callback(lambda _: events.append("scored"))
    answer.generated.add_done_callback(lambda _: events.append("generated"))
    return answer, events


def generate(answer: Answer, *responses: str) -> None:
    answer.request.set_result(list(responses))


def test_what_arrives_during_a_score_is_scored_together_in_the_order_in_which_it_was_generated(score):
    queue = ScoringQueue(score)
    (first, events), (second, _), (third, _) = follow(queue, "a", "b"), follow(queue, "c"), follow(queue, "d", "e")
    generate(first, "1", "2")
    assert score.begun.wait(10)
    generate(third, "4", "5")
    generate(second, "3")
    assert third.generated.done() and not first.scored.done()
    score.go.set()
    assert second.scored.result(10) == ["c3"] and third.scored.result(10) == ["d4", "e5"]
    assert first.scored.result(10) == ["a1", "b2"] and events == ["generated", "scored"]
    assert score.calls == [["a", "b"], ["d", "e", "c"]]


def test_the_queue_goes_on_after_it_was_empty_and_after_an_error(score):
    score.go.set()
    queue = ScoringQueue(score)
    for prompt, wrong in (("a", None), ("bad", "no score"), ("b", None)):
        answer, _ = follow(queue, prompt)
        generate(answer, "1")
        if wrong is None:
            assert answer.scored.result(10) == [prompt + "1"]
        else:
            with pytest.raises(RewardError, match=wrong):
                answer.scored.result(10)


def test_an_error_of_the_engine_and_a_cancelled_request_come_at_once(score):
    queue = ScoringQueue(score)
    (slow, _), (failed, events), (aborted, _) = follow(queue, "a"), follow(queue, "b"), follow(queue, "c")
    generate(slow, "1")
    failed.request.set_exception(RolloutError("no server"))
    aborted.request.cancel()
    with pytest.raises(RolloutError, match="no server"):
        failed.scored.result(0)
    with pytest.raises(CancelledError):
        aborted.scored.result(0)
    assert events == ["generated", "scored"] and not slow.scored.done()
    score.go.set()


def test_nothing_is_scored_that_was_cancelled_while_it_waited(score):
    queue = ScoringQueue(score)
    answers = [follow(queue, prompt)[0] for prompt in "abc"]
    for answer in answers:
        generate(answer, "1")
        assert score.begun.wait(10)
    answers[1].cancel()
    score.go.set()
    assert answers[2].scored.result(10) == ["c1"] and score.calls == [["a"], ["c"]]
