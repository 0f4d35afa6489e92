"""Whole runs that meet a fault: what loses nothing ends with the bits of an undisturbed run, and what is lost is counted.

Compared are metrics, samples, weights, optimizer and the positions in data and sampler (same_run.py). All runs are made by one
process (faulty_runs.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.examples.reliability_page import assert_told
from tests.rollout.sglang.fake_server import fake_python
from tests.train.runs import QUICKSTART, SMALL, metrics, python
from tests.train.same_run import assert_same_run, samples

OPTIONS = [
    *("warm_start=null", "eval.sets={}", "parallel.tensor_parallel=1", "num_rollout_steps=2"),
    *("checkpoint.every=1", "checkpoint.keep=9", "checkpoint.export_at_end=false"),
    *("observe.tensorboard=false", "observe.plot_at_end=false", "observe.samples_per_step=1000"),
    *("reward.function=faulty.py:by_text", "reward.workers=1", "reward.timeout_seconds=5"),
]
# of the responses whose number is 3 modulo 4, each meets a fault; ONLY_FAULT names the one that all of them meet
REWARD = """
import os, time, zlib
from pathlib import Path

def by_length(data_source, solution_str, ground_truth, extra_info=None):
    return float(len(solution_str) % 2)

def by_text(data_source, solution_str, ground_truth, extra_info=None):
    number = zlib.crc32(solution_str.encode())
    if number % 4 < 3:
        return float(number % 2)
    return FAULTS[os.environ.get("ONLY_FAULT") or ("raise", "nan", "exit", "hang")[number // 4 % 4]]()

def fail():
    raise ValueError("no answer")

def hang():
    if os.path.exists("hung"):  # once: it takes the whole deadline
        fail()
    Path("hung").touch()
    time.sleep(3600)

FAULTS = {"raise": fail, "nan": lambda: float("nan"), "exit": lambda: os._exit(3), "hang": hang, "none": lambda: -1.0}
"""
STALE = {"weight_version": "0", "weight_versions": [{"version": "0", "start": 0, "end": 1}]}
# A server that is out already is not told again. So each fault has its time: four in step 1, whose 32 requests go on meanwhile;
# one in step 2's first request; one when each of the 32 has been sent and some are sent again, since the weights were in doubt.
FIRST_SERVER = [
    {"kind": "status", "value": 500, "count": 2, "after": 1, "version": 0},
    {"kind": "close", "after": 4, "version": 0},
    {"kind": "garbage", "after": 6, "version": 0},
    {"kind": "edit", "value": STALE, "version": 1},
    {"kind": "die", "after": 31, "version": 1},
]
SECOND_SERVER = [{"kind": "die", "where": "bucket 1"}]
BAD_ROWS = [
    '{"prompt": "1+1="}\n',
    '{"prompt": null, "answer": "2"}\n',
    '{"prompt": 7, "answer": "2"}\n',
    '{"prompt": "1+1\n',
]
SERVED = ["rollout.engine=sglang", "rollout.sglang.device=cpu", "rollout.sglang.sync=tensor", "num_rollout_steps=3"]
SERVED += ["rollout.sglang.bucket_mib=1", "reward.function=faulty.py:by_length"]


def cases(served: list[str]) -> list[dict[str, Any]]:
    longer, valued = ["num_rollout_steps=4"], ["reward.on_failure=value", "reward.failure_value=-1.0"]
    dirty = ["data.files=[dirty.jsonl]"]
    cut = {"step_000003/manifest.json": 0, "step_000002/shards/rank_00000.safetensors": 5000}
    return [
        case("calm", *served),
        case("stormy", *served, servers={"0": FIRST_SERVER, "2": SECOND_SERVER}),
        case("whole", *longer),
        case("damaged", *longer, copy_of="whole", damage=cut),
        case("full", *longer, full_at=2),
        case("full", *longer),
        case("full-beside", *longer, "checkpoint.async_save=true", full_at=2),
        case("each-its-own", *longer, only_fault=""),
        case("valued", *valued, only_fault=""),
        case("returned", *valued, only_fault="none"),
        case("clean", "data.files=[clean.jsonl]"),
        case("dirty", *dirty, "data.on_bad_row=skip"),
        case("refused", *dirty),
    ]


def case(name: str, *overrides: str, **faults: Any) -> dict[str, Any]:
    return {"name": name, "overrides": overrides, **faults}


@pytest.fixture(scope="module")
def ended(task: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, str]]]:
    """Return {name of a run: status and output of each of its starts}."""
    folder = tmp_path_factory.mktemp("server")
    (task / "faulty.py").write_text(REWARD)
    rows = (task / "runs/arithmetic/train.jsonl").read_text().splitlines(keepends=True)[:40]
    (task / "clean.jsonl").write_text("".join(rows))
    (task / "dirty.jsonl").write_text("".join([*rows[:20], *BAD_ROWS, *rows[20:]]))
    planned = cases([*SERVED, f"rollout.sglang.python={fake_python(folder, tail=1.0)}"])
    arguments = ["-W", "ignore", "-m", "tests.train.faulty_runs", QUICKSTART, *SMALL, *OPTIONS]
    done = python(task, *arguments, stdin=json.dumps(planned), merge=True, FAKE_FAULTS=str(folder / "faults.json"))
    outputs = done.stdout.split("ENDED ")
    assert len(outputs) == len(planned) + 1 and "Traceback" not in done.stdout, done.stdout
    found: dict[str, list[tuple[int, str]]] = {}
    for made, output, next_output in zip(planned, outputs, outputs[1:]):
        found.setdefault(made["name"], []).append((int(next_output.split()[0]), output))
    return found


def told_in(starts: list[tuple[int, str]], *statuses: int) -> str:
    """Return what the starts of a run have written; they must have ended so."""
    assert tuple(status for status, _ in starts) == statuses, starts
    return " ".join("".join(output for _, output in starts).split())


COUNTED = {"rollout/retries", "rollout/servers_suspected", "rollout/servers_excluded", "rollout/servers_resynced"}
COUNTED |= {
    "rollout/server_restarts",
    "rollout/dropped_malformed",
    "rollout/dropped_unknown_version",
    "sync/weights_lost",
}
TIMED = {"sampling/in_flight_mean", "sampling/in_flight_max"}


def test_servers_that_fail_in_every_way_cost_no_bit_of_the_run(task, ended):
    """A server refuses requests, drops one, answers nonsense and from weights that nobody sent, and dies in the midst of others; the
    one that takes its place dies in the midst of its first sync."""
    told_in(ended["calm"], 0)
    told = told_in(ended["stormy"], 0)
    for fault in ("server dies while it generates", "server dies in a weight sync", "answer from other weights"):
        assert_told(fault, told)
    rows = metrics(task, "stormy")
    counts = {name: sum(row[name] for row in rows) for name in COUNTED}
    assert counts["rollout/server_restarts"] == 2 and counts["rollout/dropped_unknown_version"] == 1, counts
    assert counts["rollout/retries"] >= 6 and counts["sync/weights_lost"] == 2, counts
    assert_same_run(task / "runs/calm", task / "runs/stormy", but=COUNTED | TIMED)


def test_a_run_whose_two_newest_checkpoints_are_damaged_repeats_both_steps(task, ended):
    told = told_in(ended["damaged"], 0)
    assert_told("damaged checkpoint", told)
    assert "step_000003/manifest.json is damaged: it is empty; step_000003 was renamed to step_000003.corrupt" in told
    assert "rank_00000.safetensors is truncated: 5000 of" in told and "resumed after rollout step 1" in told
    assert_same_run(task / "runs/whole", task / "runs/damaged")


def test_a_full_disk_ends_a_run_that_goes_on_bitwise_once_there_is_room(task, ended):
    told = told_in(ended["full"], 2, 0)
    assert_told("full disk", told)
    assert "step_000002 cannot be written: File too large; raise the limit on file sizes" in told
    assert "resumed after rollout step 1" in told
    assert_same_run(task / "runs/whole", task / "runs/full")


def test_a_full_disk_beside_training_is_told_and_the_run_goes_on(task, ended):
    told = told_in(ended["full-beside"], 0)
    assert "step_000002 was not saved beside training, since rank 0 failed: File too large; the next one is" in told
    assert sorted(path.name for path in (task / "runs/full-beside/checkpoints").iterdir()) == [
        f"step_{step:06d}" for step in (1, 3, 4)
    ]
    assert_same_run(task / "runs/whole", task / "runs/full-beside")


def test_a_reward_that_fails_masks_its_sample_whatever_the_way(task, ended):
    """The run `whole` masks the same samples, but all of its failures are exceptions."""
    assert_told("reward fails", told_in(ended["each-its-own"], 0))
    kinds = {sample["failure"] for sample in samples(task / "runs/each-its-own")}
    died, raised = "exit: the reward process ended with code 3", "exception: ValueError: no answer"
    assert kinds == {None, "nan", "timeout", died, raised}
    assert_same_run(task / "runs/whole", task / "runs/each-its-own", but={"failure"})


def test_a_reward_that_fails_gives_the_configured_value_as_if_it_had_returned_it(task, ended):
    told_in(ended["valued"], 0)
    told_in(ended["returned"], 0)
    assert sum(row["reward/failures"] for row in metrics(task, "valued")) > 10
    assert_same_run(
        task / "runs/returned", task / "runs/valued", but={"failure", "reward/failures", "reward/unparsed_ratio"}
    )


def test_bad_rows_are_refused_or_left_out_as_if_they_were_not_there(task, ended):
    told_in(ended["clean"], 0)
    assert "44 rows gave 40 prompts (4 bad); first bad row: dirty.jsonl row 21: no 'answer'" in told_in(
        ended["dirty"], 0
    )
    assert_told("malformed row", told_in(ended["refused"], 2))
    assert not (task / "runs/refused").exists()
    assert_same_run(task / "runs/clean", task / "runs/dirty", but={"row"})
