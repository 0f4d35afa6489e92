"""Runs whose responses continue after weight updates. Responses of the fake servers have a long tail of lengths, and some, also
one of the first six groups, end only after an update. A response repeats its prompt, and a reward function of the test decides
whether it is right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dapo_mcore.rollout.sglang.client.versions import FIRST_WITH_CONTINUED_REQUESTS
from tests.rollout.sglang.serving import real_python, real_version
from tests.train.runs import metrics
from tests.train.served import fake_beside_reward, run_served, trained

KEEP = [
    "num_rollout_steps=4",
    "rollout.async_steps=0",
    "rollout.max_response_tokens=160",
    "sampling.on_full=keep",
    "sampling.max_staleness=2",
    "sampling.max_in_flight_groups=6",
    "sampling.max_gen_batches=9",
    "batch.mini_batch_prompts=4",
    "eval.sets={heldout: {files: [runs/arithmetic/heldout.jsonl], answer_key: answer, limit: 4}}",
    "eval.at_start=false",
    "eval.temperature=0.5",
]


@pytest.fixture(scope="module")
def fake(tmp_path_factory) -> Path:
    return fake_beside_reward(tmp_path_factory.mktemp("fake"), tail=1.0, linger=9)


def checkpoint(task: Path, name: str, step: int) -> dict:
    return json.loads((task / f"runs/{name}/checkpoints/step_{step:06d}/state.json").read_text())["train"]


def assert_no_prompt_is_lost(task: Path, name: str) -> None:
    """Assert that each prompt that was drawn was trained on once, or is listed in the last checkpoint as still to be trained on."""
    steps, last = trained(task, name), checkpoint(task, name, 4)
    uids = [uid for groups in steps.values() for uid in groups]
    left = [*last["sampler"]["again"], *(group["uid"] for group in last["sampler"]["groups"])]
    assert len(uids) == 16 and [len(groups) for groups in steps.values()] == [4] * 4
    assert len({*uids, *left}) == len(uids) + len(left) == last["loader"]["offset"] and last["loader"]["epoch"] == 0


def assert_kept(rows: list[dict]) -> None:
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["sampling/groups_stale"] == row["sampling/surplus_dropped"] == 0 for row in rows)
    assert all(row["rollout/retries"] == row["rollout/servers_suspected"] == 0 for row in rows)
    assert 1 <= max(row["sampling/staleness_max"] for row in rows) <= 2
    assert all(row["sampling/groups_pending"] >= 0 for row in rows)
    # may exceed staleness_mean: long responses count more here, and they are the older ones
    assert all(row["sampling/token_staleness_mean"] <= row["sampling/staleness_max"] for row in rows)
    assert [row["step"] for row in rows if "val/heldout/mean@2" in row] == [2, 4]


def assert_some_continue_after_an_update(rows: list[dict]) -> None:
    assert sum(row["sampling/groups_pending"] > 0 for row in rows) >= 2
    assert sum(row["sampling/samples_resumed"] for row in rows) > 0


def test_a_run_keeps_groups_in_flight_and_after_a_resume_generates_them_again(task, fake):
    done = run_served(task, fake, "keep", *KEEP)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_kept(metrics(task, "keep"))
    assert_some_continue_after_an_update(metrics(task, "keep"))
    assert_no_prompt_is_lost(task, "keep")

    for step in (3, 4):
        shutil.rmtree(task / f"runs/keep/checkpoints/step_{step:06d}")
    again = checkpoint(task, "keep", 2)["sampler"]["again"]
    resumed = run_served(task, fake, "keep", *KEEP)
    assert resumed.returncode == 0 and "resumed after rollout step 2" in resumed.stdout, resumed.stdout + resumed.stderr
    assert len(again) == metrics(task, "keep")[1]["sampling/groups_pending"]
    assert_no_prompt_is_lost(task, "keep")


@pytest.mark.parametrize("server", ["fake", pytest.param("real", marks=pytest.mark.sglang)])
def test_with_async_steps_the_weights_change_while_the_next_step_is_generated(task, fake, server):
    if server == "real" and real_version() < FIRST_WITH_CONTINUED_REQUESTS:
        pytest.skip("this version of SGLang is refused: tests/rollout/sglang/test_real_resume.py")
    name, served = f"beside-{server}", real_python() if server == "real" else fake
    done = run_served(task, fake, name, *KEEP, "rollout.async_steps=1", server=served)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = metrics(task, name)
    assert_kept(rows)
    assert_no_prompt_is_lost(task, name)
    if server == "fake":  # a real one may finish all its requests before the update
        assert_some_continue_after_an_update(rows)
