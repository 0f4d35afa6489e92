"""Whole runs of num_epochs, at three data-parallel ranks and odd sizes: every prompt once per epoch, also across a resume."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.train.runs import metrics, run
from tests.train.same_run import assert_same_run, samples
from tests.train.served import fake_beside_reward, run_served, trained

ONE_RANK_EACH = [
    *(
        "warm_start=null",
        "parallel.tensor_parallel=1",
        "num_rollout_steps=null",
        "data.limit=7",
        "rollout.group_size=3",
    ),
    *("sampling.train_batch_prompts=4", "sampling.gen_batch_prompts=4", "batch.mini_batch_prompts=null"),
    *("batch.mini_batch_samples=6", "optimizer.warmup_updates=null", "optimizer.warmup_rollout_steps=2"),
    *(
        "checkpoint.every=1",
        "checkpoint.keep=null",
        "eval.every=null",
        "eval.at_start=false",
        "observe.samples_per_step=1000",
    ),
    *("observe.tensorboard=false", "observe.plot_at_end=false", "optimizer.lr=0.001"),
    "optimizer.decay_updates=1",  # below the warm-up, but of no cosine
]


@pytest.fixture(scope="module")
def tailed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fake server whose responses have a long tail of lengths."""
    return fake_beside_reward(tmp_path_factory.mktemp("tailed"), tail=1.0, linger=9)


def test_epochs_are_exact_at_three_ranks_and_across_a_resume(task: Path):
    """2 × 7 prompts in steps of 4 are 4 + 4 + 4 + 2 groups of 3 samples, in mini-batches of 2 groups: 2 + 2 + 2 + 1 gradient steps."""
    told = run(task, "whole", "num_epochs=2", *ONE_RANK_EACH, processes=3)
    rows = metrics(task, "whole")
    assert [row["sampling/groups_kept"] for row in rows] == [4, 4, 4, 2]
    assert [row["updates"] for row in rows] == [2, 4, 6, 7]
    assert [row["actor/lr"] for row in rows] == [0.0005, 0.001, 0.001, 0.001], "a warm-up of 2 steps of 2 updates"
    assert [any(name.startswith("val/") for name in row) for row in rows] == [False, False, False, True]
    shown = (sample for sample in samples(task / "runs/whole") if "set" not in sample)
    asked = Counter(sample["uid"] for sample in shown)
    assert sorted(asked.values()) == [2 * 3] * 7
    assert "num_epochs 2 × 7 prompts: 4 rollout steps, 8 gradient steps at most" in told
    assert "step 4/4" in told and "rollout step 4 is the last, with 2 of sampling.train_batch_prompts 4 groups" in told

    # as if it had been killed after step 2, in the first epoch
    shutil.copytree(task / "runs/whole", task / "runs/resumed")
    shutil.rmtree(task / "runs/resumed/hf")
    for step in (3, 4):
        shutil.rmtree(task / f"runs/resumed/checkpoints/step_{step:06d}")
    assert "resumed after rollout step 2" in run(task, "resumed", "num_epochs=2", *ONE_RANK_EACH, processes=3)
    assert_same_run(task / "runs/whole", task / "runs/resumed")
    assert "num_epochs is 2; raise it to go on" in run(task, "resumed", "num_epochs=2", *ONE_RANK_EACH)


def test_last_prompts_that_all_have_the_same_answer_end_the_run_with_what_is_due(task: Path):
    """An untrained policy's answers do not vary after a few of them have been right by a function of their length."""
    (task / "seldom.py").write_text(
        "def first(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    import os\n"
        "    if os.path.exists('enough'):\n"
        "        return 0.0\n"
        "    open('count', 'a').write('x')\n"
        "    n = os.path.getsize('count')\n"
        "    if n >= 16:  # 4 of them tried the function at the start\n"
        "        open('enough', 'w').close()\n"
        "    return float(n % 2)\n"
    )
    options = ["sampling.style=filter", "reward.function=seldom.py:first", "reward.workers=1", "checkpoint.every=null"]
    told = run(task, "seldom", "num_epochs=1", *ONE_RANK_EACH, *options)
    rows = metrics(task, "seldom")
    assert [row["step"] for row in rows] == [1] and any(name.startswith("val/") for name in rows[0])
    assert (
        "num_epochs 1 is over, and none of the last 3 groups is left to train on (0 all right, 3 all wrong, 0 too old); the run ends "
        "with rollout step 1" in told
    )
    assert "step 1/≤2" in told and (task / "runs/seldom/hf/final").is_dir()
    shutil.rmtree(
        task / "runs/seldom/checkpoints"
    )  # as if checkpoint.at_end had been false: the export is all that there is
    again = run(task, "seldom", "num_epochs=1", *ONE_RANK_EACH, *options)
    assert "nothing to do, and nothing changed: rollout step 1 of" in again


def test_epochs_are_exact_while_the_next_step_is_generated_beside_training_and_across_a_resume(task: Path, fake: Path):
    """Each of 14 prompts is generated for once, and each group that varies is trained on once, whichever step it is carried to."""
    options = ["num_rollout_steps=null", "num_epochs=1", "data.limit=14"]

    def start() -> tuple[str, dict[int, set[str]]]:
        done = run_served(task, fake, "beside", *options)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "num_epochs 1 is over: rollout step 4 is the last, with 2 of" in done.stdout
        return done.stdout, {step: set(groups) for step, groups in trained(task, "beside").items()}

    _, steps = start()
    assert [len(groups) for groups in steps.values()] == [4, 4, 4, 2] and len(set.union(*steps.values())) == 14
    assert sum(row["sampling/groups_generated"] for row in metrics(task, "beside")) == 14
    for last in (3, 1):  # while the last step was generated, or one in the middle
        for step in range(last + 1, 5):
            shutil.rmtree(task / f"runs/beside/checkpoints/step_{step:06d}")
        told, again = start()
        assert f"resumed after rollout step {last}" in told and again == steps
    assert "nothing to do, and nothing changed: rollout step 4" in run_served(task, fake, "beside", *options).stdout


@pytest.mark.parametrize("on_full", ["keep", "abort"])
def test_epochs_end_when_the_last_groups_in_flight_are_trained_on(task: Path, tailed: Path, on_full: str):
    """Of 2 × 7 prompts some are aborted and asked again, or still in flight when a step ends; the last step trains on the rest."""
    options = [
        *("num_rollout_steps=null", "num_epochs=2", "data.limit=7", f"sampling.on_full={on_full}"),
        *("rollout.max_response_tokens=160", "sampling.max_in_flight_groups=6", "sampling.max_gen_batches=9"),
        *("sampling.max_staleness=3", "rollout.async_steps=0", "checkpoint.every=null"),
    ]
    done = run_served(task, tailed, on_full, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    rows, steps = metrics(task, on_full), trained(task, on_full)
    moved = {"keep": "sampling/groups_pending", "abort": "sampling/groups_aborted"}[on_full]
    assert sum(row[moved] for row in rows) > 0 and rows[-1][moved] == 0
    assert (
        sum(row["sampling/groups_generated"] for row in rows) == sum(row["sampling/groups_kept"] for row in rows) == 14
    )
    assert [row["sampling/groups_kept"] for row in rows] == [4, 4, 4, 2]
    assert len({uid for groups in steps.values() for uid in groups}) == 7 and "num_epochs 2 is over" in done.stdout
