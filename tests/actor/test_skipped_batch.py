"""What is written of a skipped gradient step, and what happens if it cannot be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from dapo_mcore.actor.learner import Learner
from dapo_mcore.actor.metrics import update_metrics
from tests.actor import parity
from tests.actor.parity import Mesh

UIDS = ["a", "b", "c", "d"]
SETTINGS: dict[str, Any] = {
    "batch__mini_batch_prompts": 1,
    "algo__old_logprobs": "actor",
    "optimizer__max_skipped_updates": 100,
}


def poisoned(layout: Any, folder: Path, **settings: Any) -> tuple[Any, Any, list[str]]:
    """Return a learner, a rollout step of four mini-batches whose third has a NaN, and the lines that the learner tells."""
    config = parity.make_config(Mesh(), output_dir=str(folder), **SETTINGS, **settings)
    scored = parity.scored_step(config, layout, parity.make_batch(), actor := parity.build_actor(config, layout))
    third, told = scored.mini_batches[2], []
    third[-1].old_logprobs[1] = math.nan
    return Learner(actor, pad_token=0, tell=told.append), scored, told


def test_a_skipped_mini_batch_is_written_with_its_samples_and_its_cause(alone, tmp_path):
    learner, scored, told = poisoned(alone, tmp_path)
    updates = learner.update(scored, UIDS)
    assert [update.skipped for update in updates] == [False, False, True, False]
    metrics = update_metrics(updates)
    assert metrics["actor/skipped_updates"] == 1 and metrics["actor/skipped_spikes"] == 0
    assert all(math.isfinite(value) for value in metrics.values()), "the other three steps have all their metrics"
    folder = learner.config.run_dir / "skipped" / "update_000003"
    (line,) = told
    assert "gradient step 3 was skipped on all ranks: first not finite: old_logprobs on rank 0" in line
    assert f"its batch is in {folder}" in line
    facts = json.loads((folder / "skip.json").read_text())
    assert (facts["update"], facts["verdict"], facts["grad_norm"], facts["loss"]) == (3, "not finite", "nan", "nan")
    plan, bad = scored.step.plan[2], scored.mini_batches[2][-1]
    assert facts["culprit"]["tensor"] == "old_logprobs" and facts["culprit"]["sample"] == int(bad.sample_ids[1])
    assert facts["culprit"]["micro_batch"] == len(scored.mini_batches[2]) - 1 and facts["culprit"]["bad"] == 1
    batch = parity.make_batch()
    group = int(batch.group_ids[plan.samples[0]])
    assert [row["sample"] for row in facts["samples"]] == plan.samples.tolist()
    assert {row["uid"] for row in facts["samples"]} == {UIDS[group]}
    assert [row["reward"] for row in facts["samples"]] == batch.rewards[plan.samples].tolist()
    check_arrays(safetensors.numpy.load_file(folder / "rank_00000.safetensors"), batch, scored.mini_batches[2])


def check_arrays(found: dict[str, np.ndarray], batch: Any, micro_batches: list[Any]) -> None:
    """Assert that each sample has its tokens, mask and reward, and each loss token the numbers of its micro-batch."""
    assert sorted(found["samples"].tolist()) == np.flatnonzero(batch.group_ids == found["group_ids"][0]).tolist()
    for row, sample in enumerate(found["samples"]):
        here, there = (slice(*one.offsets[n : n + 2]) for one, n in ((batch, sample), (Arrays(found), row)))
        assert np.array_equal(found["tokens"][there], batch.tokens[here])
        assert np.array_equal(found["loss_mask"][there], batch.loss_mask[here])
        assert found["rewards"][row] == batch.rewards[sample]
    assert np.isnan(found["token_old_logprobs"]).sum() == 1
    for name in ("targets", "sample_ids", "advantages", "rollout_logprobs"):
        expected = np.concatenate([getattr(micro, name).numpy() for micro in micro_batches])
        assert np.array_equal(found[f"token_{name}"], expected), name
    assert found["token_micro_batches"].tolist() == [n for n, micro in enumerate(micro_batches) for _ in micro.rows]
    assert np.isfinite(found["token_logprobs"]).all() and (found["token_logprobs"] < 0).all()


class Arrays:
    def __init__(self, found: dict[str, np.ndarray]):
        self.offsets = found["offsets"]


def test_the_first_three_batches_and_the_newest_two_are_kept_and_one_that_cannot_be_written_is_told(alone, tmp_path):
    learner, scored, told = poisoned(alone, tmp_path)
    for _ in range(7):
        learner.update(scored)
    folder = learner.config.run_dir / "skipped"
    assert sorted(path.name for path in folder.iterdir()) == [f"update_{n:06d}" for n in (3, 7, 11, 23, 27)]
    blocked, scored, told = poisoned(alone, tmp_path, name="blocked")
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "skipped").write_text("a file where the folder should be")
    assert [update.skipped for update in blocked.update(scored)] == [False, False, True, False]
    assert len(told) == 1 and "its batch could not be written to" in told[0] and "exists" in told[0], told
