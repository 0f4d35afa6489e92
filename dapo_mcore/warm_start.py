"""Supervised training on demonstrations before RL, with the same actor, until the policy is sometimes right.

Change here: what a warm start trains on, and when it stops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count

import numpy as np

from dapo_mcore.actor.learner import Learner
from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.actor.scatter import scatter_step
from dapo_mcore.config.data import WarmStartConfig
from dapo_mcore.config.optimizer import OptimizerConfig
from dapo_mcore.config.schema import Config
from dapo_mcore.controller import Controller
from dapo_mcore.data.demonstrations import Demonstration
from dapo_mcore.data.loader import epoch_order
from dapo_mcore.handover import Handover
from dapo_mcore.types import TrainBatch


def warm_start(
    config: Config, learner: Learner, handover: Handover, controller: Controller | None, layout: Layout
) -> None:
    """Train until the choose set's pass rate reaches `stop_at`, or for `max_updates` updates.

    Then reset the optimizer and take the new policy as the reference. Every rank must call this; `controller` is None
    on all ranks but 0.
    """
    settings = config.warm_start
    assert settings is not None
    actor = learner.actor
    actor.reset_optimizer(_optimizer_config(settings, config.optimizer))
    batches = _batches(controller.data.demonstrations, settings.batch_size, config.seed) if controller else None
    check = _PassRate(config, settings, controller) if controller else None
    for update in range(1, settings.max_updates + 1):
        handover.to_training()
        batch = next(batches) if batches else None
        share = scatter_step(batch, config, layout, mini_batch_prompts=settings.batch_size, seed=None)
        (mini_batch,) = learner.build(share, "token-mean")
        sums = actor.update(mini_batch, supervised=True).sums
        if update % settings.check_every and update != settings.max_updates:
            continue
        handover.to_rollout(version=0)
        judge = partial(check.reached, update, sums["nll"] / sums["tokens"]) if check else lambda: None
        if layout.broadcast_object(handover.attend(judge)):
            break
    else:
        if controller and settings.stop_at is not None:
            controller.progress.line(
                f"warm start ended at max_updates {settings.max_updates}, short of stop_at {settings.stop_at}"
            )
    handover.to_training()
    actor.guard.check_trained()
    actor.reset_optimizer(config.optimizer)
    actor.freeze_reference()
    if actor.critic is not None:
        actor.critic.start_from(actor.policy)


def _optimizer_config(settings: WarmStartConfig, base: OptimizerConfig) -> OptimizerConfig:
    return base.model_copy(
        update=dict(
            lr=settings.lr,
            warmup_updates=settings.warmup_updates,
            weight_decay=settings.weight_decay,
            schedule="constant",
            beta2=0.99,
        )
    )


class _PassRate:
    """Pass rate of the policy on the choose set, measured and shown every check_every updates."""

    def __init__(self, config: Config, settings: WarmStartConfig, controller: Controller):
        self.settings, self.controller, self.seed = settings, controller, config.seed
        choose = controller.data.choose
        self.prompts = choose.prompts if choose else ()

    def reached(self, update: int, nll: float) -> bool:
        line = f"warm start {update}/{self.settings.max_updates} | nll {nll:.3f}"
        if not self.prompts:
            self.controller.progress.line(line)
            return False
        rate = self.controller.pass_rate(self.prompts, self.seed + update)
        self.controller.progress.line(f"{line} | pass rate {rate:.3f}")
        return self.settings.stop_at is not None and rate >= self.settings.stop_at


def _batches(rows: Sequence[Demonstration], batch_size: int, seed: int) -> Iterator[TrainBatch]:
    """Yield batches of demonstrations in a seeded order, endlessly. An incomplete batch at an epoch's end is skipped."""
    assert len(rows) >= batch_size, f"{len(rows)} demonstrations make no batch of {batch_size}"
    for epoch in count():
        order = epoch_order(seed, epoch, len(rows))
        for begin in range(0, len(order) - batch_size + 1, batch_size):
            yield _to_batch([rows[i] for i in order[begin : begin + batch_size]])


def _to_batch(rows: Sequence[Demonstration]) -> TrainBatch:
    """Return the rows as a batch, each row its own group, with the loss on what the policy writes."""
    tokens = np.concatenate([ids for row in rows for ids in (row.prompt, row.response)])
    mask = np.concatenate([part for row in rows for part in (np.zeros(len(row.prompt), bool), row.trained)])
    return TrainBatch(
        tokens=tokens,
        loss_mask=mask,
        rollout_logprobs=np.zeros(len(tokens), dtype=np.float32),
        offsets=np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64),
        rewards=np.ones(len(rows)),
        group_ids=np.arange(len(rows)),
        in_statistics=np.ones(len(rows), dtype=bool),
    )
