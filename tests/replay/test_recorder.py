"""Records of an actor in one process, by hand. Over whole runs and other layouts: test_replay.py."""

from __future__ import annotations

import numpy as np
import pytest

from dapo_mcore.actor.learner import Learner
from dapo_mcore.actor.scatter import scatter_step
from dapo_mcore.observe.timing import PhaseTimer
from dapo_mcore.replay import record as records
from dapo_mcore.replay.digest import Digester
from dapo_mcore.replay.record import Origins, PromptRecord, Sources
from dapo_mcore.replay.recorder import NullRecorder, Recorder, open_recorder
from tests.actor.parity import Mesh, build_actor, make_batch, make_config

BATCH = make_batch()
SOURCES = Sources(
    [PromptRecord(f"train:{n}", f"row {n}") for n in range(4)],
    Origins(**{name: np.arange(16) for name in Origins.__dataclass_fields__}),
)


def settings(tmp_path, **overrides):
    options = {
        "output_dir": str(tmp_path),
        "name": "run",
        "observe__record": True,
        "checkpoint__every": 1,
        "batch__mini_batch_prompts": 2,
        "batch__epochs": 2,
        "algo__old_logprobs": "actor",
    }
    return make_config(Mesh(), **options | overrides)


def train(actor, recorder: NullRecorder, steps: int, batch=BATCH):
    """Train as the loop does, and return the statistics of all updates."""
    config, found = actor.config, []
    learner = Learner(actor, pad_token=0)
    recorder.start(0)
    for step in range(1, steps + 1):
        share = scatter_step(batch, config, actor.layout, mini_batch_prompts=2, seed=5)
        recorder.add_batch(step, share, 5, batch)
        scored = learner.score(share)
        recorder.add_scores(scored)
        found += learner.update(scored, watch=recorder.add_update)
        recorder.finish()
    return found


def test_a_step_is_recorded_with_all_that_went_in_and_came_out(alone, tmp_path):
    config = settings(tmp_path, observe__record_keep=1)
    actor, other = build_actor(config, alone), build_actor(config, alone)
    start = Digester(actor).weights()
    timer = PhaseTimer()
    recorder = open_recorder(config, actor, lambda: SOURCES, pytest.fail, timer)
    with timer.phase("train"):
        stats = train(actor, recorder, 2)
    times = timer.pop()
    assert times.keys() == {"time/record_s", "time/train_s", "time/step_s"}
    assert all(seconds > 0 for seconds in times.values())
    run = config.run_dir
    assert records.read_start(run, 1).weights == start
    step = records.read_step(run, 2)
    assert (step.step, step.num_updates, step.shuffle_seed, step.prompts) == (2, 8, 5, SOURCES.prompts)
    assert sorted(sample for mini in step.plan for replica in mini for micro in replica for sample in micro) == list(
        range(16)
    )
    assert len(step.plan) == 2 and step.inputs.keys() == {"old_logprobs", "advantages"}
    for update, expected in zip(step.updates, stats[4:], strict=True):
        assert update.metrics["grad_norm"] == expected.grad_norm and update.metrics["lr"] == expected.lr
        assert update.metrics["loss"] == expected.sums["loss"] and not update.skipped
        norm = sum(digest.norm**2 for digest in update.gradients.values()) ** 0.5
        assert norm == pytest.approx(expected.grad_norm, rel=1e-6), "before clipping, and each element once"
        assert update.gradients.keys() == step.weights.keys() == start.keys()
    assert step.inputs["advantages"].norm > 0
    assert step.weights == Digester(actor).weights() != records.read_step(run, 1).weights
    assert records.has_batch(run, 2) and not records.has_batch(run, 1)
    found = records.read_batch(run, 2)
    assert np.array_equal(found.batch.tokens, BATCH.tokens) and np.array_equal(found.origins.seeds, np.arange(16))

    quiet = open_recorder(settings(tmp_path, observe__record=False), other, lambda: None, pytest.fail, timer)
    assert type(quiet) is NullRecorder
    train(other, quiet, 2)
    assert "time/record_s" not in timer.pop()
    assert Digester(other).weights() == step.weights, "recording changes no number"


def test_a_disk_that_refuses_a_record_costs_a_line_and_no_step(alone, tmp_path):
    config, told = settings(tmp_path), []
    (tmp_path / "run").write_text("a file in the place of the folder")
    actor = build_actor(config, alone)
    assert len(train(actor, Recorder(config, actor, config.run_dir, told.append, lambda: SOURCES), 1)) == 4
    assert told and all("warning: cannot record the run" in line and "training goes on" in line for line in told)
