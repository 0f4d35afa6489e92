"""Turns of actor and engine on shared devices: their order, and a sync that must be repeated. On two ranks, TP2."""

from __future__ import annotations

from typing import Any

from dapo_mcore.errors import UpdateBroken
from tests.actor import parity
from tests.actor.parity import Mesh


def test_the_engine_is_told_in_order_and_gets_the_weights_of_every_step() -> None:
    told = parity.spawn(train, Mesh(tensor=2))
    assert told["calls"] == ["update 0", "resume", "release", "update 1", "resume", "release", "update 1", "resume"]
    first, second, again = told["sums"]
    assert first != second and second == again  # saving in between changes nothing
    assert told["handover_s"] == 3 * 3.0 + 2 * 1.0  # three times resumed, twice released


def test_servers_that_were_lost_in_training_get_the_weights_once_they_are_back() -> None:
    told = parity.spawn(lose_all_servers, Mesh(tensor=2))
    assert told["calls"] == ["update 0", "resume", "release", "update 0", "resume"]
    first, second = told["sums"]
    assert first == second
    assert told["handover_s"] == 3.0 + 1.0 + 3.0  # resumed in vain, released, resumed; the syncs are not in it


class Engine:
    """What handover.py asks of a colocated engine, written down; `now` is a clock that its calls move."""

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


def handover(layout: Any, mesh: Mesh, engine: Engine) -> Any:
    from dapo_mcore.handover import Handover

    config = parity.make_config(mesh)
    actor = parity.build_actor(config, layout)
    theirs = engine if layout.is_controller else None
    return config, actor, Handover(actor, theirs, layout, colocated=True, clock=lambda: engine.now)


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
