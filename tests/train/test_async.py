"""Runs whose servers generate the next step while this step is trained on. A fake server's response repeats its prompt, and a
reward function of the test decides whether it is right."""

from __future__ import annotations

import re
import shutil

import pytest

from dapo_mcore.replay.record import read_batch, read_step
from tests.rollout.sglang.serving import real_python
from tests.train.runs import metrics, python
from tests.train.served import run_served, trained

DISAGREE = "WARNING: rollout engine and trainer disagree"


def test_each_step_trains_on_weights_of_the_step_before_and_a_resumed_run_loses_no_prompt(task, fake):
    done = run_served(task, fake, "ahead", "num_rollout_steps=4", "observe.record=true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "starting 1 SGLang server (logs in runs/ahead/servers)\n1 of 1 SGLang server up after " in done.stdout
    rows, steps = metrics(task, "ahead"), trained(task, "ahead")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert ["time/start_s" in row for row in rows] == [True, False, False, False]
    assert all(name in row for row in rows for name in ("tis/weight_mean_after", "tis/effective_sample_size"))
    assert [row["updates"] for row in rows] == [1, 2, 3, 4]
    # steps 1 and 2 generate with version 0, step k with version k - 2; a group carried over is a version older
    newest = [max(groups.values()) for groups in steps.values()]
    assert newest == [0, 0, 1, 2]
    assert rows[0]["sampling/staleness_max"] == 0
    assert all(1 <= row["sampling/staleness_max"] <= 2 and row["sampling/groups_stale"] == 0 for row in rows[1:])
    assert all(row["time/generate_s"] > 0 and row["time/wait_s"] >= 0 for row in rows)
    assert all(0 < row["sampling/in_flight_mean"] <= row["sampling/in_flight_max"] <= 3 for row in rows)
    assert all(0.1 < row["mismatch/logprob_diff_mean"] <= row["mismatch/logprob_diff_max"] for row in rows)
    assert done.stdout.count(DISAGREE) == 1, "shown once, at the first step"
    assert len({uid for groups in steps.values() for uid in groups}) == 16, "no prompt is trained on twice"

    # a record tells the version of each sample, whatever has been generated ahead meanwhile, and repeats bit for bit
    for step, groups in steps.items():
        prompts, origins = read_step(task / "runs/ahead", step).prompts, read_batch(task / "runs/ahead", step).origins
        assert {own.uid: int(origins.weight_versions[4 * number]) for number, own in enumerate(prompts)} == groups
    again = python(task, "-m", "dapo_mcore.cli", "replay", "runs/ahead", "4", merge=True)
    assert again.returncode == 0 and "step 4: bitwise the same as recorded" in again.stdout, again.stdout

    # the checkpoint of step 2 was written when the groups of step 3 were generated but not trained on
    for step in (3, 4):
        shutil.rmtree(task / f"runs/ahead/checkpoints/step_{step:06d}")
    again = run_served(task, fake, "ahead", "num_rollout_steps=4", "observe.record=true")
    assert again.returncode == 0 and "resumed after rollout step 2" in again.stdout, again.stdout + again.stderr
    assert again.stdout.count(DISAGREE) == 1, "shown again at a new start"
    resumed = trained(task, "ahead")
    assert {step: set(groups) for step, groups in resumed.items()} == {s: set(groups) for s, groups in steps.items()}
    assert max(resumed[3].values()) == 2, "generated again, with the newest weights"
    assert [row["step"] for row in metrics(task, "ahead")] == [1, 2, 3, 4]


def test_a_rollout_that_fails_during_training_ends_every_rank(task, fake):
    # at most 6 groups of 4 are scored for step 1; after that every answer is wrong
    shared = task / "shared"
    shared.mkdir()
    options = ["num_rollout_steps=4", f"rollout.sglang.sync_dir={shared}"]
    done = run_served(task, fake, "wrong", *options, processes=2, wrong_from=24)
    assert done.returncode != 0
    assert list(shared.iterdir()) == [], "torchrun ends rank 0 while it cleans up"
    told = r"error: \d of sampling.train_batch_prompts 4 groups have answers that vary after sampling.max_gen_batches 2"
    assert len(re.findall(told, done.stderr)) == 1, done.stderr
    assert [row["step"] for row in metrics(task, "wrong")] == [1, 2], (
        "the step that was trained meanwhile, and the counts of the one that failed"
    )
    assert (task / "runs/wrong/checkpoints/step_000001").is_dir()


def test_a_mismatch_beyond_the_limit_ends_the_run_before_it_trains(task, fake):
    options = ["rollout.async_steps=0", "algo.old_logprobs=rollout", "algo.tis.mode=off", "algo.max_mismatch=0.001"]
    done = run_served(task, fake, "apart", "num_rollout_steps=1", *options)
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(r"mean [\d.]+ nats.* but algo.max_mismatch allows a mean of 0.001", done.stderr), done.stderr
    assert metrics(task, "apart") == []


@pytest.mark.sglang
def test_on_a_real_server_only_the_samples_of_the_first_step_come_from_the_trained_policy(task, fake):
    options = ["num_rollout_steps=3", "optimizer.lr=0.01", "optimizer.warmup_updates=0"]
    done = run_served(task, fake, "real", *options, server=real_python())
    assert done.returncode == 0, done.stdout + done.stderr
    rows, steps = metrics(task, "real"), trained(task, "real")
    assert [max(groups.values()) for groups in steps.values()] == [0, 0, 1]
    assert rows[0]["mismatch/logprob_diff_max"] < 1e-4
    # later samples come from weights that are one training step older than the policy
    assert all(row["mismatch/logprob_diff_mean"] > 1e-3 for row in rows[1:])
    assert all(row["rollout/retries"] == 0 and row["rollout/servers_serving"] == 1 for row in rows)
    assert len({uid for groups in steps.values() for uid in groups}) == 12
