"""Recorded runs as users start them, and their replays: the same bits, another layout, and one changed bit of each kind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dapo_mcore.replay import record as records
from tests.replay import runs_twice
from tests.train.runs import QUICKSTART, SMALL, metrics, python, rewind, stable, torchrun

RECORDED = [
    "observe.record=true",
    "checkpoint.every=2",
    "num_rollout_steps=4",
    "parallel.tensor_parallel=1",
    "eval.sets={}",
    "observe.tensorboard=false",
    "observe.plot_at_end=false",
]


def train(name: str, *overrides: str) -> list:
    return ["train", [QUICKSTART, *SMALL, *RECORDED, f"name={name}", *overrides]]


def played(task: Path, *commands: list) -> list[tuple[int, str]]:
    done = python(task, runs_twice.__file__, stdin=json.dumps(commands))
    assert done.returncode == 0, done.stdout + done.stderr
    return [tuple(result) for result in json.loads(done.stdout.partition("RESULTS")[2])]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def changed(run_dir: Path, name: str, step: int, array: str) -> str:
    """Copy a run, change the first element that counts of an array of a step's batch, and return the copy."""
    copy = run_dir.with_name(name)
    shutil.copytree(run_dir, copy)
    given = records.read_batch(copy, step)
    values = getattr(given.batch, array)
    values[given.batch.loss_mask.argmax() if array == "tokens" else 0] += 1
    records.write_step(copy, records.read_step(copy, step), records.write_batch(copy, step, given))
    return f"runs/{name}"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def recorded(task) -> Path:
    """Return a recorded run; beside it `plain`, the same without a record, and `ppo`, with a critic."""
    results = played(
        task,
        train("whole"),
        train("plain", "observe.record=false"),
        train("ppo", "algo.advantage=gae", "critic.warmup_steps=3", "parallel.check_replicas=true"),
    )
    assert [status for status, _ in results] == [0, 0, 0], results
    return task / "runs/whole"


def test_recording_changes_no_number(task, recorded):
    assert list(map(stable, metrics(task, "whole"))) == list(map(stable, metrics(task, "plain")))
    final = "hf/final/model.safetensors"
    assert (recorded / final).read_bytes() == (task / "runs/plain" / final).read_bytes()
    assert not (task / "runs/plain/record").exists()
    given = records.read_batch(recorded, 3)
    assert (given.origins.seeds >= 0).all() and set(given.origins.weight_versions) == {2}


def test_a_run_trains_its_critic_first_and_then_the_policy_too(task, recorded):
    first, *_, last = rows = [row for row in metrics(task, "ppo") if row["step"]]
    assert [row["updates_per_step"] for row in rows] == [0, 0, 0, 2]
    assert all(row["critic/vf_loss"] > 0 and row["critic/grad_norm"] > 0 for row in rows)
    assert "actor/loss" not in first and last["actor/grad_norm"] > 0
    weights = records.read_step(task / "runs/ppo", 3).weights
    assert "critic.value_head.weight" in weights and "critic.output_layer.weight" not in weights
    start = records.read_start(task / "runs/ppo", 1).weights
    moved = {name.startswith("critic.") for name, digest in weights.items() if digest != start[name]}
    assert moved == {True}, "the warm-up leaves the policy as it is"


def test_replays_find_the_same_bits_and_each_changed_one(task, recorded):
    shutil.copytree(recorded, task / "runs/parts")
    rewind(task / "runs/parts", 2)
    shutil.copytree(recorded, task / "runs/gone")
    (records.step_folder(task / "runs/gone", 3) / records.BATCH_FILE).unlink()
    shutil.copytree(recorded, task / "runs/damaged")
    flip(records.step_folder(task / "runs/damaged", 3) / records.BATCH_FILE)
    before = files(recorded)
    token, reward = changed(recorded, "token", 4, "tokens"), changed(recorded, "reward", 3, "rewards")
    (
        (same, output),
        (elsewhere, elsewhere_output),
        (resumed, _),
        (with_critic, critic_output),
        *others,
    ) = played(
        task,
        ["replay", ["runs/whole", "4"]],
        ["replay", ["runs/whole", "3", "--out", "elsewhere", "observe.samples_per_step=0"]],
        train("parts"),
        ["replay", ["runs/ppo", "4"]],
        ["replay", [token, "4"]],
        ["replay", [reward, "4"]],
        ["flipped", ["runs/whole", "3"]],
        ["replay", ["runs/whole", "1"]],
        ["replay", ["runs/whole", "5"]],
        ["replay", ["runs/gone", "4"]],
        ["replay", ["runs/damaged", "4"]],
        ["replay", ["runs/plain", "4"]],
        ["replay", ["runs/whole", "4", "--out", "runs/whole/again"]],
    )
    assert (same, elsewhere, resumed, with_critic) == (0, 0, 0, 0), (output, elsewhere_output, critic_output)
    told = (
        "weights after step 2, to start from: bitwise the same",
        "step 3: bitwise the same",
        "step 4: bitwise the same",
    )
    assert all(line in output and line in critic_output for line in told) and "step 3: " in elsewhere_output
    assert files(recorded) == before, "a replay writes nothing into the run's folder"
    assert records.recorded_steps(task / "elsewhere") == [3]
    whole, parts = (files(folder / "record") for folder in (recorded, task / "runs/parts"))
    for step in ("step_000003", "step_000004"):
        assert whole[f"{step}/batch.safetensors"] == parts[f"{step}/batch.safetensors"]
        assert whole[f"{step}/step.json"] == parts[f"{step}/step.json"]
    expected = [
        (1, "step 4: differs, first in "),
        (1, "step 3: differs, first in advantages"),
        (
            1,
            "weights after step 2, to start from: differs, first in weights before: decoder.layers.1.mlp.linear_fc2.weight",
        ),
        (2, "has no checkpoint before rollout step 1, and a replay does not repeat the warm start"),
        (2, "has no record of rollout step 5; it has those of 4 steps from 1 to 4"),
        (2, "but the batches of steps 3 are not in runs/gone/record"),
        (
            2,
            "step_000003/batch.safetensors is changed: its SHA-256 is not that of manifest.json; copy it again from where",
        ),
        (2, "runs/plain has no record of a start before rollout step 4"),
        (2, "lies in runs/whole, which a replay leaves as it is"),
    ]
    for (status, text), (expected_status, message) in zip(others, expected, strict=True):
        assert status == expected_status and message in text and "Traceback" not in text, (message, text)
    assert "configuration, layout, packages, devices and flags are as recorded" in others[0][1]


def test_a_replay_on_three_data_parallel_ranks_finds_rounding_and_a_changed_reward(task, recorded):
    reward = changed(recorded, "late-reward", 4, "rewards")
    done = python(task, *torchrun(3), "-m", "dapo_mcore.cli", "replay", reward, "4", "--out", "three", merge=True)
    assert done.returncode == 1, done.stdout
    assert "weights after step 2, to start from: bitwise the same" in done.stdout
    assert "step 3: the same within rounding; largest difference" in done.stdout
    assert "step 4: differs, first in advantages" in done.stdout
    assert records.read_start(task / "three", 3).setting.layout["data"] == 3
