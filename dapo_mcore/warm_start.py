"""Supervised steps on demonstrations, through the same actor and head, until the policy can be told right from wrong.

Change here: what a warm start trains on, and when it stops.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from dapo_mcore.actor.layout import Layout
from dapo_mcore.actor.learner import Learner
from dapo_mcore.actor.scatter import scatter_step
from dapo_mcore.config import Config, OptimizerConfig, WarmStartConfig
from dapo_mcore.controller import Controller
from dapo_mcore.data.chat import PromptRenderer
from dapo_mcore.data.loader import epoch_order
from dapo_mcore.data.prompts import load_prompts
from dapo_mcore.data.rows import read_rows
from dapo_mcore.errors import DataError
from dapo_mcore.handover import Handover
from dapo_mcore.types import TrainBatch


def warm_start(
    config: Config, learner: Learner, handover: Handover, controller: Controller | None, layout: Layout
) -> None:
    """Trains until `stop_at` is reached on the choose set, or `max_updates`; then a fresh optimizer, a new reference.

    The controller is rank 0's; every rank must call this.
    """
    settings = config.warm_start
    assert settings is not None
    actor = learner.actor
    actor.reset_optimizer(_optimizer_config(settings, config.optimizer))
    batches = _Demonstrations(config, settings, controller.tokenizer).batches() if controller else None
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
    actor.skips.check_trained()
    actor.reset_optimizer(config.optimizer)
    actor.freeze_reference()


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
    """Measures the policy on the choose set, shows it, and says whether it is enough."""

    def __init__(self, config: Config, settings: WarmStartConfig, controller: Controller):
        self.settings, self.controller, self.seed = settings, controller, config.seed
        choose = settings.choose
        self.prompts = load_prompts(choose, controller.tokenizer, "choose").prompts if choose else ()

    def reached(self, update: int, nll: float) -> bool:
        line = f"warm start {update}/{self.settings.max_updates} | nll {nll:.3f}"
        if not self.prompts:
            self.controller.progress.line(line)
            return False
        rate = self.controller.pass_rate(self.prompts, self.seed + update)
        self.controller.progress.line(f"{line} | pass rate {rate:.3f}")
        return self.settings.stop_at is not None and rate >= self.settings.stop_at


class _Demonstrations:
    """Rows of prompt and response as token arrays, in a seeded order without end."""

    def __init__(self, config: Config, settings: WarmStartConfig, tokenizer: Any):
        self.batch_size, self.seed = settings.batch_size, config.seed
        self.tokenizer = tokenizer
        render = PromptRenderer(config.data, tokenizer).render
        self.rows = [self._tokens(row, render) for row in read_rows(settings.files)]
        if len(self.rows) < self.batch_size:
            raise DataError(
                f"warm_start.files hold {len(self.rows)} demonstrations, fewer than warm_start.batch_size "
                f"{self.batch_size}; add rows or lower the batch size"
            )

    def batches(self) -> Iterator[TrainBatch]:
        epoch = 0
        while True:
            order = epoch_order(self.seed, epoch, len(self.rows))
            for begin in range(0, len(order) - self.batch_size + 1, self.batch_size):
                yield _to_batch([self.rows[i] for i in order[begin : begin + self.batch_size]])
            epoch += 1

    def _tokens(self, row: Any, render: Any) -> tuple[np.ndarray, np.ndarray]:
        columns = row.columns or {}
        prompt, response = columns.get("prompt"), columns.get("response")
        if not prompt or not isinstance(response, str):
            has = row.problem or f"the row has {json.dumps(sorted(columns))}"
            raise DataError(f"{row.where}: a demonstration needs `prompt` and `response`, both text; {has}")
        _, prompt_ids = render(prompt, row.where)
        ids = self.tokenizer(response, add_special_tokens=False)["input_ids"]
        return prompt_ids, np.array([*ids, self.tokenizer.eos_token_id], dtype=np.int32)


def _to_batch(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> TrainBatch:
    """Every row a group of its own; the loss is on the response."""
    tokens = np.concatenate([part for row in rows for part in row])
    mask = np.concatenate([np.full(len(part), trained) for row in rows for part, trained in zip(row, (False, True))])
    lengths = [len(prompt) + len(response) for prompt, response in rows]
    return TrainBatch(
        tokens=tokens,
        loss_mask=mask,
        rollout_logprobs=np.zeros(len(tokens), dtype=np.float32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        rewards=np.ones(len(rows)),
        group_ids=np.arange(len(rows)),
        in_statistics=np.ones(len(rows), dtype=bool),
    )
