"""Runs whose servers generate the next step while this step is trained on. The servers are fake: a response repeats its
prompt, and a reward function of the test says whether it is right."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rollout.sglang.fake_server import fake_python
from tests.rollout.sglang.serving import real_python
from tests.test_train import ROOT, SMALL, metrics, task, torchrun  # noqa: F401  the fixture is used by name

# right and wrong take turns, so every group varies, until `WRONG_FROM` responses were scored
REWARD = """
import itertools, os
_asked = itertools.count()

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    number = next(_asked)
    return float(number % 2 if number < int(os.environ["WRONG_FROM"]) else 0)
"""
DISAGREE = "WARNING: rollout engine and trainer disagree"
ASYNC = [
    "warm_start=null",
    "eval.sets={}",
    "rollout.engine=sglang",
    "rollout.async_steps=1",
    "rollout.sglang.device=cpu",
    "algo.tis.mode=truncate",
    "reward.workers=1",
    "sampling.style=filter",
    "sampling.train_batch_prompts=4",
    "sampling.gen_batch_prompts=6",
    "sampling.max_staleness=2",
    "sampling.carry_surplus=true",
    "sampling.on_exhausted=error",
    "sampling.max_gen_batches=2",
    "sampling.max_in_flight_groups=3",
    "checkpoint.every=1",
    "checkpoint.keep=9",
    "checkpoint.export_at_end=false",
    "observe.samples_per_step=1000",
]


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fake")
    (folder / "alternating.py").write_text(REWARD)
    return fake_python(folder, tokens_per_s=200)


def run(
    task: Path,  # noqa: F811
    python: Path,
    name: str,
    *overrides: str,
    processes: int = 1,
    wrong_from: int = 10**9,
    server: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """`server` is the interpreter that serves, where it is not the fake one beside the reward function."""
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher = [*torchrun(processes), "-m"]
    reward = f"reward.function={python.parent / 'alternating.py'}:compute_score"
    arguments = [
        *SMALL,
        *ASYNC,
        reward,
        f"rollout.sglang.python={server or python}",
        f"parallel.tensor_parallel={processes}",
    ]
    return subprocess.run(
        [*launcher, "dapo_mcore.train", str(ROOT / "examples/quickstart.yaml"), *arguments, f"name={name}", *overrides],
        cwd=task,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "WRONG_FROM": str(wrong_from),
            **({"FAKE_DEAF": "1"} if processes > 1 else {}),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )


def trained(task: Path, name: str) -> dict[int, dict[str, int]]:  # noqa: F811
    """{step: {uid of a group trained on: version of its weights}}"""
    files = sorted((task / "runs" / name / "samples").glob("*.jsonl"))
    rows = {int(path.stem[5:]): map(json.loads, path.read_text().splitlines()) for path in files}
    return {step: {row["uid"]: row["weight_version"] for row in some} for step, some in rows.items()}


def test_each_step_trains_on_weights_of_the_step_before_and_a_resumed_run_loses_no_prompt(task, python):  # noqa: F811
    done = run(task, python, "ahead", "num_rollout_steps=4")
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
    assert done.stdout.count(DISAGREE) == 1, "told once, at the first step"
    assert len({uid for groups in steps.values() for uid in groups}) == 16, "no prompt is trained on twice"

    # the checkpoint of step 2 was written when the groups of step 3 were there and not trained on
    for step in (3, 4):
        shutil.rmtree(task / f"runs/ahead/checkpoints/step_{step:06d}")
    again = run(task, python, "ahead", "num_rollout_steps=4")
    assert again.returncode == 0 and "resumed after rollout step 2" in again.stdout, again.stdout + again.stderr
    assert again.stdout.count(DISAGREE) == 1, "told again at a new start"
    resumed = trained(task, "ahead")
    assert {step: set(groups) for step, groups in resumed.items()} == {s: set(groups) for s, groups in steps.items()}
    assert max(resumed[3].values()) == 2, "asked again, of the newest weights"
    assert [row["step"] for row in metrics(task, "ahead")] == [1, 2, 3, 4]


def test_a_rollout_that_fails_beside_training_ends_every_rank(task, python):  # noqa: F811
    # 6 groups of 4 at most are scored for step 1; from then on every answer is wrong
    shared = task / "shared"
    shared.mkdir()
    options = ["num_rollout_steps=4", f"rollout.sglang.sync_dir={shared}"]
    done = run(task, python, "wrong", *options, processes=2, wrong_from=24)
    assert done.returncode != 0
    assert list(shared.iterdir()) == [], "torchrun ends rank 0 while it cleans up"
    told = r"error: \d of sampling.train_batch_prompts 4 groups have answers that vary after sampling.max_gen_batches 2"
    assert len(re.findall(told, done.stderr)) == 1, done.stderr
    assert [row["step"] for row in metrics(task, "wrong")] == [1, 2], (
        "the step beside it, and what the failed one generated"
    )
    assert (task / "runs/wrong/checkpoints/step_000001").is_dir()


def test_a_mismatch_beyond_the_limit_ends_the_run_before_it_trains(task, python):  # noqa: F811
    options = ["rollout.async_steps=0", "algo.old_logprobs=rollout", "algo.tis.mode=off", "algo.max_mismatch=0.001"]
    done = run(task, python, "apart", "num_rollout_steps=1", *options)
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(r"mean [\d.]+ nats.* but algo.max_mismatch allows a mean of 0.001", done.stderr), done.stderr
    assert metrics(task, "apart") == []


@pytest.mark.sglang
def test_on_a_real_server_only_the_first_steps_samples_are_the_trained_policys(task, python):  # noqa: F811
    options = ["num_rollout_steps=3", "optimizer.lr=0.01", "optimizer.warmup_updates=0"]
    done = run(task, python, "real", *options, server=real_python())
    assert done.returncode == 0, done.stdout + done.stderr
    rows, steps = metrics(task, "real"), trained(task, "real")
    assert [max(groups.values()) for groups in steps.values()] == [0, 0, 1]
    assert rows[0]["mismatch/logprob_diff_max"] < 1e-4
    # from then on the policy has learned from one step more than the weights that its samples come from
    assert all(row["mismatch/logprob_diff_mean"] > 1e-3 for row in rows[1:])
    assert all(row["rollout/retries"] == 0 and row["rollout/servers_serving"] == 1 for row in rows)
    assert len({uid for groups in steps.values() for uid in groups}) == 12
