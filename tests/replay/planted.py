"""Small made-up records of runs, and changes to plant in them. The numbers mean nothing; no model is run."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dapo_mcore.config.file import dump_config, load_config
from dapo_mcore.replay.record import (
    BatchRecord,
    Digest,
    Origins,
    PromptRecord,
    Setting,
    StartRecord,
    StepRecord,
    UpdateRecord,
    write_batch,
    write_start,
    write_step,
)
from dapo_mcore.types import TrainBatch

QUICKSTART = Path(__file__).parents[2] / "examples/quickstart.yaml"
PROMPTS, SIZE, PROMPT_TOKENS = 4, 2, 3
LAYOUT = {"tensor": 1, "pipeline": 1, "context": 1, "data": 2, "world_size": 2}
WEIGHTS = (
    "embedding.word_embeddings.weight",
    "decoder.layers.0.mlp.linear_fc1.weight",
    "decoder.final_layernorm.weight",
)
Change = Callable[[Any], Any]


def setting(**layout: int) -> Setting:
    return Setting(LAYOUT | layout, {"torch": "2.13"}, {"cpu": 2}, {"deterministic": "True"})


def digest(*seed: int, scale: float = 1.0) -> Digest:
    """Return the digest of a tensor that differs by `scale`: its hash is another for each scale."""
    draw = np.random.default_rng(seed)
    norm, projection = draw.uniform(1, 2, 2)
    return Digest(f"{zlib.crc32(repr((seed, scale)).encode()):016x}", norm * scale, projection * scale)


def batch_record(step: int) -> BatchRecord:
    draw = np.random.default_rng(step)
    lengths = PROMPT_TOKENS + draw.integers(4, 9, PROMPTS * SIZE)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    mask = np.concatenate([np.arange(length) >= PROMPT_TOKENS for length in lengths])
    samples = len(lengths)
    rewards = draw.choice([-1.0, 1.0], samples)
    batch = TrainBatch(
        tokens=draw.integers(1, 16, offsets[-1], dtype=np.int32),
        loss_mask=mask,
        rollout_logprobs=np.where(mask, -draw.random(offsets[-1]), 0).astype(np.float32),
        offsets=offsets,
        rewards=rewards,
        group_ids=np.repeat(np.arange(PROMPTS), SIZE),
        in_statistics=np.ones(samples, bool),
    )
    origins = Origins(
        seeds=np.full(samples, 1000 + step),
        weight_versions=np.full(samples, step - 1),
        scores=rewards.copy(),
        penalties=np.zeros(samples),
        accs=rewards > 0,
        finish_reasons=np.zeros(samples, np.int64),
        span_samples=np.arange(samples),
        span_starts=np.zeros(samples, np.int64),
        span_versions=np.full(samples, step - 1),
    )
    return BatchRecord(batch, origins)


def step_record(step: int) -> StepRecord:
    updates = [
        UpdateRecord(
            metrics={"tokens": 40.0, "loss": 0.25, "grad_norm": 1.5 + step, "lr": 1e-4},
            skipped=False,
            logprobs=digest(step, number, 1),
            gradients={name: digest(step, number, 2, i) for i, name in enumerate(WEIGHTS)},
        )
        for number in range(2)
    ]
    return StepRecord(
        step=step,
        num_updates=2 * step,
        shuffle_seed=None,
        prompts=[PromptRecord(f"uid{step}{group}", f"train.jsonl row {group + 1}") for group in range(PROMPTS)],
        plan=[[[[0, 1]], [[2, 3]]], [[[4], [5]], [[6, 7]]]],
        inputs={"old_logprobs": digest(step, 3), "advantages": digest(step, 4)},
        updates=updates,
        weights={name: digest(step, 5, i) for i, name in enumerate(WEIGHTS)},
    )


def write_run(
    run_dir: Path,
    *overrides: str,
    steps: int = 3,
    own: Setting | None = None,
    changes: dict[int, tuple[Change, Change]] | None = None,
    start: Change = lambda record: record,
) -> Path:
    """Write the records of a run, and return its folder.

    changes  step → functions that change its StepRecord and its BatchRecord; None as a batch leaves it out.
    """
    run_dir.mkdir(parents=True)
    config = load_config(QUICKSTART, ["warm_start=null", *overrides])
    weights = {name: digest(0, 5, i) for i, name in enumerate(WEIGHTS)}
    write_start(run_dir, start(StartRecord(0, 0, own or setting(), weights)), dump_config(config))
    for step in range(1, steps + 1):
        change_step, change_batch = (changes or {}).get(step, (lambda r: r, lambda r: r))
        batch = change_batch(batch_record(step))
        folder = None if batch is None else write_batch(run_dir, step, batch)
        write_step(run_dir, change_step(step_record(step)), folder)
    return run_dir


def unchanged(record: Any) -> Any:
    return record


def in_batch(name: str, index: int, value: Any) -> Change:
    """Return a change of one element of an array of the batch or of its origins."""

    def change(record: BatchRecord) -> BatchRecord:
        part = "batch" if name in TrainBatch.__dataclass_fields__ else "origins"
        array = getattr(getattr(record, part), name).copy()
        array[index] = value
        return replace(record, **{part: replace(getattr(record, part), **{name: array})})

    return change
