"""A warm start by hand: which demonstrations each gradient step trains on, and when it stops. Actor and engine are made up."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np

from dapo_mcore.actor.scatter import ScatteredStep
from dapo_mcore.config.schema import Config
from dapo_mcore.data.demonstrations import Demonstration
from dapo_mcore.data.loader import epoch_order
from dapo_mcore.warm_start import warm_start

ROWS = [([10, 11], [12]), ([20], [21, 99, 22]), ([30], [31])]
"""Prompt and response of each demonstration. Token 99 is a tool's output."""
SEEN = [([10, 11], [12]), ([20, 99], [21, 22]), ([30], [31])]
"""Tokens of each demonstration that are not trained on, and those that are."""
ALONE = SimpleNamespace(
    data=1, context=1, tensor=1, data_rank=0, control_group=None, replica_groups=[object()],
    broadcast=lambda tensor, group: tensor, broadcast_object=lambda value: value,
)  # fmt: skip


class Run:
    """One warm start of a job of one process. `calls` and `lines` say what it did, `batches` what it trained on."""

    def __init__(self, pass_rates: Iterable[float] = (), **settings: Any):
        self.calls: list[Any] = []
        self.lines: list[str] = []
        self.batches: list[list[tuple[list[int], list[int]]]] = []
        self.seeds: list[int] = []
        rates = iter(pass_rates)
        if pass_rates:
            settings["choose"] = {"files": "unused"}
        tree = {"model": {"path": "unused"}, "data": {"files": "unused"}, "optimizer": {"lr": 1e-6}, "seed": 7}
        self.config = Config.model_validate(tree | {"warm_start": {"files": "unused", "batch_size": 2, **settings}})
        rows = [Demonstration(np.array(p, np.int32), np.array(r, np.int32), np.array(r) != 99, "row") for p, r in ROWS]

        def pass_rate(prompts: Any, seed: int) -> float:
            self.seeds.append(seed)
            return next(rates)

        choose = SimpleNamespace(prompts=["a prompt"]) if pass_rates else None
        controller = SimpleNamespace(
            data=SimpleNamespace(demonstrations=rows, choose=choose),
            progress=SimpleNamespace(line=self.lines.append),
            pass_rate=pass_rate,
        )
        actor = SimpleNamespace(
            reset_optimizer=lambda optimizer: self.calls.append((optimizer.lr, optimizer.schedule)),
            update=self._update,
            guard=SimpleNamespace(check_trained=lambda: self.calls.append("check")),
            freeze_reference=lambda: self.calls.append("reference"),
            policy="the policy",
            critic=SimpleNamespace(start_from=lambda policy: self.calls.append(f"critic from {policy}")),
        )
        handover = SimpleNamespace(
            to_training=lambda: None,
            to_rollout=lambda version: self.calls.append(f"sync {version}"),
            attend=lambda action: action(),
        )
        learner = SimpleNamespace(actor=actor, build=lambda step, loss_mode: [step])
        warm_start(self.config, learner, handover, controller, ALONE)

    def _update(self, step: ScatteredStep, supervised: bool) -> Any:
        assert supervised
        batch, bounds = step.batch, step.batch.offsets
        tokens, trained = np.split(batch.tokens, bounds[1:-1]), np.split(batch.loss_mask, bounds[1:-1])
        self.batches.append([(t[~m].tolist(), t[m].tolist()) for t, m in zip(tokens, trained, strict=True)])
        return SimpleNamespace(sums={"nll": 3.0, "tokens": 2.0})


def test_each_gradient_step_trains_on_the_responses_of_one_batch():
    """Three rows make one batch of two per epoch; the third waits for another epoch's order. What a tool has written is not trained on."""
    run = Run(max_updates=4)
    expected = [epoch_order(7, epoch, 3)[:2] for epoch in range(4)]
    assert [sorted(batch) for batch in run.batches] == [sorted(SEEN[i] for i in epoch) for epoch in expected]
    assert len({tuple(epoch) for epoch in expected}) > 1


def test_it_has_an_optimizer_of_its_own_and_leaves_a_fresh_one_and_a_reference():
    run = Run(max_updates=2, lr=3e-3)
    assert run.calls == [
        (3e-3, "constant"),
        "sync 0",
        "check",
        (1e-6, "constant"),
        "reference",
        "critic from the policy",
    ]
    assert run.lines == ["warm start 2/2 | nll 1.500"]


def test_it_stops_once_the_pass_rate_is_reached_at_a_check():
    run = Run(pass_rates=(0.2, 0.5), stop_at=0.5, check_every=2, max_updates=10)
    assert len(run.batches) == 4
    assert run.lines == [
        "warm start 2/10 | nll 1.500 | pass rate 0.200",
        "warm start 4/10 | nll 1.500 | pass rate 0.500",
    ]
    assert run.seeds == [7 + 2, 7 + 4]


def test_the_last_gradient_step_is_checked_and_a_rate_that_is_short_is_told():
    run = Run(pass_rates=(0.1, 0.4), stop_at=0.5, check_every=2, max_updates=3)
    assert len(run.batches) == 3
    assert run.lines[1:] == [
        "warm start 3/3 | nll 1.500 | pass rate 0.400",
        "warm start ended at max_updates 3, short of stop_at 0.5",
    ]
