"""Handover between actor and engine on two tensor-parallel ranks: the order of calls, and syncs that must be repeated."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch

from dapo_mcore.errors import DapoError, RolloutError, UpdateBroken
from dapo_mcore.process.signals import ControllerShutdown, Interrupted
from tests.actor import parity
from tests.actor.parity import Mesh


def test_the_engine_is_called_in_order_and_gets_the_weights_of_every_step() -> None:
    told = parity.spawn(train, Mesh(tensor=2))
    assert told["calls"] == ["update 0", "resume", "release", "update 1", "resume", "release", "update 1", "resume"]
    first, second, again = told["sums"]
    assert first != second and second == again  # saving in between changes nothing
    assert told["handover_s"] == 3 * 3.0 + 2 * 1.0  # three times resumed, twice released


def test_servers_that_failed_during_training_get_the_weights_once_they_are_back() -> None:
    told = parity.spawn(lose_all_servers, Mesh(tensor=2))
    assert told["calls"] == ["update 0", "resume", "release", "update 0", "resume"]
    first, second = told["sums"]
    assert first == second
    assert told["handover_s"] == 3.0 + 1.0 + 3.0  # resumed without success, released, resumed; syncs are not counted


def test_servers_that_lose_the_weights_get_them_again_from_all_ranks_while_rank_0_waits_for_them() -> None:
    told = parity.spawn(attend, Mesh(tensor=2))
    assert told == {"calls": ["update 3", "update 3"], "answer": "answer", "elsewhere": [None], "weights_lost": 1.0}


def test_an_error_while_rank_0_waits_for_the_engine_is_raised_on_every_rank() -> None:
    told = parity.spawn(attend_failures, Mesh(tensor=2))
    assert told["here"] == ["no answers", "nobody takes them"]
    assert told["there"] == [["rank 0 failed: no answers", "rank 0 failed: nobody takes them"]]
    assert told["cancelled"], "requests would wait for weights that never come"


def test_a_signal_lets_a_sync_finish_and_then_cancels_the_requests() -> None:
    """Nothing else is started."""
    told = parity.spawn(attend_until_a_signal, Mesh(tensor=2))
    assert told["calls"] == ["update 0", "update 0", "synced", "cancelled"]
    assert told["answers"] == [None, None] and told["elsewhere"] == [[None, None]]


def test_a_peer_takes_part_in_every_try_and_is_dismissed_however_the_try_ends() -> None:
    told = parity.spawn(sync_with_a_peer, Mesh(tensor=2))
    assert told["calls"] == ["update 3", "dismiss"] * 4
    assert told["elsewhere"] == [4 * [[]]]  # the stream yields nothing on rank 1, but its shards have arrived
    assert told["errors"] == ["no weights"] and len(set(told["sums"])) == 1


class Engine:
    """A colocated engine that records its calls. `now` is a clock that the calls advance."""

    def __init__(self, broken: int = 0):
        self.calls: list[str] = []
        self.sums: list[float] = []
        self.now = 0.0
        self._broken = broken

    def update_weights(self, weights: Any, version: int) -> None:
        self.now += 10.0
        self.calls.append(f"update {version}")
        self.sums.append(sum(float(tensor.double().sum()) for _, tensor in weights))

    def release(self) -> None:
        self.now += 1.0
        self.calls.append("release")

    def resume(self) -> None:
        self.now += 3.0
        self.calls.append("resume")
        if self._broken:
            self._broken -= 1
            raise UpdateBroken("nobody serves")


class ForgetfulEngine(Engine):
    """An engine on servers that lose the weights whenever they generate.

    refuses          the servers refuse every update after the first.
    signals_in_sync  SIGINT arrives during such an update.
    """

    def __init__(self, refuses: bool = False, signals_in_sync: bool = False):
        super().__init__()
        self.weights_lost, self._refuses, self._signals = False, refuses, signals_in_sync
        self._changed = threading.Condition()
        self.cancelled = False

    def update_weights(self, weights: Any, version: int) -> None:
        super().update_weights(weights, version)
        if self.weights_lost and self._refuses:
            raise RolloutError("nobody takes them")
        if self.weights_lost and self._signals:
            os.kill(os.getpid(), signal.SIGINT)
            self.calls.append("synced")
            return
        with self._changed:
            self.weights_lost = False
            self._changed.notify_all()

    def generate(self, *_: Any) -> Any:
        self.weights_lost = True
        with self._changed:
            self._changed.wait_for(lambda: self.cancelled or not self.weights_lost, 60)
        if self.cancelled:
            self.calls.append("cancelled")
            raise CancelledError
        return "answer"

    def cancel_requests(self) -> None:
        with self._changed:
            self.cancelled = True
            self._changed.notify_all()

    submit = metrics = close = generate
    weight_version = 0


class LeadingEngine(Engine):
    """An engine whose peers wait for its word. Its updates fail with the errors of `outcomes`, None for a success."""

    weight_version = 0
    generate = metrics = close = Engine.release

    def __init__(self, layout: Any, outcomes: list[Exception | None]):
        super().__init__()
        self._layout, self._outcomes = layout, outcomes

    def update_weights(self, weights: Any, version: int) -> None:
        super().update_weights(weights, version)
        if (error := self._outcomes.pop(0)) is not None:
            raise error

    def dismiss_peers(self) -> None:
        self.calls.append("dismiss")
        self._layout.broadcast_object("dismissed")


class Peer:
    """A peer that drains the stream and waits until it is dismissed."""

    def __init__(self, layout: Any):
        self._layout = layout
        self.served: list[list[Any]] = []

    def serve(self, weights: Any) -> None:
        self.served.append(list(weights))
        assert self._layout.broadcast_object(None) == "dismissed"


def handover(layout: Any, mesh: Mesh, engine: Engine, colocated: bool = True, **more: Any) -> Any:
    from dapo_mcore.handover import Handover

    config = parity.make_config(mesh)
    actor = parity.build_actor(config, layout)
    theirs = engine if layout.is_controller else None
    return config, actor, Handover(actor, theirs, layout, colocated=colocated, clock=lambda: engine.now, **more)


def gathered(layout: Any, value: Any) -> list[Any]:
    """Return the values of every rank but the first."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value, group=layout.control_group)
    return values[1:]


def attend(layout: Any, mesh: Mesh) -> dict[str, Any]:
    engine = ForgetfulEngine()
    _, _, turns = handover(layout, mesh, engine, colocated=False)
    turns.to_rollout(version=3)
    answer = turns.attend(lambda: engine.generate() if layout.is_controller else None)
    elsewhere = gathered(layout, answer)
    lost = turns.pop_metrics()["sync/weights_lost"]
    return {"calls": engine.calls, "answer": answer, "elsewhere": elsewhere, "weights_lost": lost}


def sync_with_a_peer(layout: Any, mesh: Mesh) -> dict[str, Any]:
    """Worker: a sync that succeeds at its third try, and one that is refused."""
    engine = LeadingEngine(layout, [UpdateBroken("again"), UpdateBroken("again"), None, RolloutError("no weights")])
    peer = None if layout.is_controller else Peer(layout)
    _, _, turns = handover(layout, mesh, engine, colocated=False, peer=peer)
    turns.to_rollout(version=3)
    with pytest.raises(DapoError, match="no weights") as caught:
        turns.to_rollout(version=3)
    elsewhere = gathered(layout, peer and peer.served)
    return {"calls": engine.calls, "sums": engine.sums, "errors": [str(caught.value)], "elsewhere": elsewhere}


def attend_failures(layout: Any, mesh: Mesh) -> dict[str, Any]:
    engine = ForgetfulEngine(refuses=True)
    _, _, turns = handover(layout, mesh, engine, colocated=False)
    turns.to_rollout(version=0)

    def fail() -> None:
        if layout.is_controller:
            raise RolloutError("no answers")

    told = []
    for action in (fail, lambda: engine.generate() if layout.is_controller else None):
        with pytest.raises(DapoError) as caught:
            turns.attend(action)
        told.append(str(caught.value))
    return {"here": told, "there": gathered(layout, told), "cancelled": engine.cancelled}


def attend_until_a_signal(layout: Any, mesh: Mesh) -> dict[str, Any]:
    """Worker: rank 0 gets SIGINT during a sync, after which the servers still lack the weights."""
    engine = ForgetfulEngine(signals_in_sync=True)
    shutdown = ControllerShutdown(lambda: "go on")
    run_interruptible = shutdown.run_interruptible if layout.is_controller else None
    _, _, turns = handover(layout, mesh, engine, colocated=False, run_interruptible=run_interruptible)
    turns.to_rollout(version=0)
    action = lambda: engine.generate() if layout.is_controller else None  # noqa: E731
    if not layout.is_controller:
        answers = [turns.attend(action), turns.attend(action)]
        gathered(layout, answers)
        return {}
    with pytest.raises(Interrupted), shutdown, shutdown.defer_signals(lambda: "saves"):
        answers = [turns.attend(action), turns.attend(action)]
        told = {"calls": engine.calls, "answers": answers, "elsewhere": gathered(layout, answers)}
    return told


def train(layout: Any, mesh: Mesh) -> dict[str, Any]:
    """Worker: a step between two syncs, then a save."""
    engine = Engine()
    config, actor, turns = handover(layout, mesh, engine)
    turns.to_training()
    turns.to_rollout(version=0)
    turns.to_training()
    (mini_batch,) = parity.shared_step(config, layout, parity.make_batch(), actor)
    actor.update(mini_batch)
    turns.to_rollout(version=1)
    with turns.borrowed():
        assert all(parameter.untyped_storage().nbytes() for parameter in actor.policy.parameters())
    return {"calls": engine.calls, "sums": engine.sums, "handover_s": turns.pop_metrics()["sync/handover_s"]}


def lose_all_servers(layout: Any, mesh: Mesh) -> dict[str, Any]:
    engine = Engine(broken=1)
    _, _, turns = handover(layout, mesh, engine)
    turns.to_rollout(version=0)
    return {"calls": engine.calls, "sums": engine.sums, "handover_s": turns.pop_metrics()["sync/handover_s"]}
