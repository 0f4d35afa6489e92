"""Generation time of a rollout step by sampling.on_full, on a fake server whose responses have a long tail.

The server's speed is that of one response, whatever else it works on: what a GPU far from full does. Training takes
no time here, so nothing is generated beside it, as it would be on servers of their own.
Run it as `pytest -m bench -s tests/rollout/sglang/bench_on_full.py`.
"""

from __future__ import annotations

import time

import numpy as np
import pytest

from dapo_mcore.config.schema import Config
from dapo_mcore.data.loader import PromptLoader
from dapo_mcore.rollout.sampling.sampler import Sampler
from dapo_mcore.rollout.sglang.engine import SGLangEngine
from dapo_mcore.types import Prompt, Score
from tests.rollout.sglang.fake_server import fake_python
from tests.rollout.sglang.serving import engine, prompts, weights

pytestmark = pytest.mark.bench
STEPS, WARM_UP, GROUPS, GROUP_SIZE, LONGEST, TOKENS_PER_S = 24, 4, 8, 4, 480, 400
MODES = [("wait", 1), ("keep", 1), ("keep", 2), ("keep", 4)]


def config(on_full: str, max_staleness: int) -> Config:
    sampling = dict(style="none", train_batch_prompts=GROUPS, max_in_flight_groups=GROUPS, max_gen_batches=100)
    return Config.model_validate(
        {
            "model": {"path": "unused"},
            "data": {"files": ["unused"]},
            "rollout": {"engine": "sglang", "group_size": GROUP_SIZE, "max_response_tokens": LONGEST},
            "sampling": {**sampling, "on_full": on_full, "max_staleness": max_staleness},
            "batch": {"mini_batch_prompts": GROUPS},
            "algo": {"old_logprobs": "rollout"},
        }
    )


def measure(made: SGLangEngine, on_full: str, max_staleness: int) -> dict[str, float]:
    """Return means over the steps after the first few, when the number of groups carried over is stable."""
    asked = [Prompt(f"train:{i}", ids, "", "") for i, ids in enumerate(prompts(2000))]
    score = lambda prompts, *_: [Score(1.0, 1.0, True)] * len(prompts)  # noqa: E731
    loader = PromptLoader(asked, seed=0, shuffle=False)
    sampler = Sampler(made, loader, score, lambda responses: [""] * len(responses), config(on_full, max_staleness))
    rows = []
    for step in range(1, STEPS + WARM_UP + 1):
        start = time.perf_counter()
        collected = sampler.collect(step)
        seconds = time.perf_counter() - start
        lengths = [len(s.rollout.token_ids) for group in collected.groups for s in group.samples]
        rows.append((seconds, np.mean(lengths), *(collected.stats[f"sampling/{name}"] for name in STATS)))
        made.update_weights(weights(0), made.weight_version + 1)
    means = np.mean(rows[WARM_UP:], axis=0)
    return dict(zip(("seconds", "length", *STATS), means.tolist(), strict=True))


STATS = ("token_staleness_mean", "staleness_max", "groups_pending", "samples_resumed", "surplus_dropped")


def test_generation_time_of_a_step(tmp_path):
    python = fake_python(tmp_path, tokens_per_s=TOKENS_PER_S, tail=1.0)
    usual = None
    print(
        f"\n{GROUPS} groups of {GROUP_SIZE}, at most {LONGEST} tokens, {TOKENS_PER_S} tokens/s, mean of {STEPS} steps"
    )
    print(f"{'on_full':8}{'max_staleness':>14}{'s a step':>10}{'of wait':>9}{'tokens':>8}  " + "  ".join(STATS))
    for on_full, max_staleness in MODES:
        with engine(tmp_path, python=python, max_lag=max_staleness if on_full == "keep" else 0) as made:
            made.update_weights(weights(0), version=0)
            row = measure(made, on_full, max_staleness)
        usual = usual or row["seconds"]
        print(
            f"{on_full:8}{max_staleness:14}{row['seconds']:10.2f}{row['seconds'] / usual:9.2f}{row['length']:8.0f}  "
            + "  ".join(f"{row[name]:{len(name)}.2f}" for name in STATS)
        )
