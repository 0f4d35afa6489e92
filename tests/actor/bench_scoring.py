"""A rollout step with the scoring pass of its first gradient step and without it, by gradient steps per rollout step.

    pytest -s -m bench tests/actor/bench_scoring.py

One process on a CPU, in CPU time, which other processes disturb less. Both ways train on the same samples of the same actor,
in turn. A step of n gradient steps has n scoring passes, or one fewer, and n forward and backward passes; so 1 / 4 of the time
is saved with n = 1 and 1 / 64 with n = 16. Two epochs have twice as many gradient steps.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table
from transformers import Qwen2Config

from dapo_mcore.actor.actor import Actor
from dapo_mcore.actor.learner import Learner
from dapo_mcore.actor.scatter import scatter_step
from dapo_mcore.config.schema import Config
from dapo_mcore.model_files.hf_folder import RandomReader
from dapo_mcore.types import TrainBatch
from tests.actor.parity import Mesh, make_config

pytestmark = pytest.mark.bench

PROMPTS, GROUP, LENGTH, VOCAB, ROUNDS = 16, 2, 128, 4096, 3


def test_print_the_time_of_a_step_with_and_without_the_first_scoring_pass(alone: Any) -> None:
    table = Table("gradient steps", "epochs", "scored, CPU s", "not scored, CPU s", "ratio")
    for updates, epochs in [(1, 1), (2, 1), (4, 1), (16, 1), (2, 2)]:
        with_it, without = measure(alone, PROMPTS // updates, epochs)
        table.add_row(
            str(updates * epochs), str(epochs), f"{with_it:.2f}", f"{without:.2f}", f"{without / with_it:.3f}"
        )
    Console(width=100).print(table)


def measure(layout: Any, mini_batch_prompts: int, epochs: int) -> tuple[float, float]:
    """Return the CPU seconds of a step with every mini-batch scored, and as it is: the median of ROUNDS each."""
    config = make_config(
        Mesh(),
        rollout={"group_size": GROUP, "max_response_tokens": LENGTH},
        sampling={"train_batch_prompts": PROMPTS, "gen_batch_prompts": PROMPTS},
        batch={"mini_batch_prompts": mini_batch_prompts, "max_tokens": 1024, "epochs": epochs},
        algo__old_logprobs="actor",
    )
    learner = Learner(build_actor(config, layout), pad_token=0)
    share = scatter_step(batch(), config, layout, mini_batch_prompts=mini_batch_prompts, seed=None)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(ROUNDS):
        for scores_all in (True, False):
            with patch.object(Config, "num_unscored", lambda *_: 0) if scores_all else nullcontext():
                start = time.process_time()
                learner.update(learner.score(share))
                seconds[scores_all].append(time.process_time() - start)
    return float(np.median(seconds[True])), float(np.median(seconds[False]))


def build_actor(config: Any, layout: Any) -> Actor:
    sizes = dict(
        hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
    )
    hf_config = Qwen2Config(vocab_size=VOCAB, architectures=["Qwen2ForCausalLM"], tie_word_embeddings=False, **sizes)
    return Actor(config, hf_config, layout, RandomReader(hf_config, seed=0))


def batch() -> TrainBatch:
    """Return samples of one length, a quarter of it prompt."""
    rng, count = np.random.default_rng(0), PROMPTS * GROUP
    mask = np.tile(np.arange(LENGTH) >= LENGTH // 4, count)
    return TrainBatch(
        tokens=rng.integers(0, VOCAB, count * LENGTH).astype(np.int32),
        loss_mask=mask,
        rollout_logprobs=np.where(mask, -8.0, 0.0).astype(np.float32),
        offsets=np.arange(count + 1) * LENGTH,
        rewards=np.tile([1.0, -1.0], PROMPTS),
        group_ids=np.repeat(np.arange(PROMPTS), GROUP),
        in_statistics=np.ones(count, dtype=bool),
    )
