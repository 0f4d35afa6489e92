"""The soak's schedule and its judgement: every planted difference and leftover is found. One whole soak is `slow`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from dapo_mcore.actor.checkpoint_blocks import CheckpointBlock
from dapo_mcore.checkpoint.publish import Publication, publish
from dapo_mcore.checkpoint.run_state import FORMAT, RunState, write_state
from dapo_mcore.checkpoint.shard_file import write_shard
from dapo_mcore.checkpoint.snapshot import Snapshot
from dapo_mcore.checkpoint.stored import check_stored
from dapo_mcore.errors import DapoError
from dapo_mcore.model_files.shard_reader import ShardReader
from tests.checkpoint.stored_checkpoint import TRAIN
from tools.soak import leftovers as places
from tools.soak.__main__ import CannotRun, build_parser, claim
from tools.soak.events import KINDS, SAVING, Event, schedule
from tools.soak.job import MARK, View
from tools.soak.leftovers import leftovers
from tools.soak.oracle import differences
from tools.soak.report import summary
from tools.soak.rounds import Outcome, Recovery, RoundResult, is_due
from tools.soak.strikes import flip_bit

ROOT = Path(__file__).parents[2]


def events(seed: int, number: int) -> list[Event]:
    return schedule(seed, number, 3, num_steps=9, num_ranks=2, kinds=list(KINDS))


def test_a_seed_gives_the_same_events_and_all_kinds_equally_often():
    assert events(5, 7) == events(5, 7) != events(6, 7)
    drawn = [event for number in range(len(KINDS)) for event in events(0, number)]
    assert Counter(event.kind for event in drawn) == dict.fromkeys(KINDS, 3)
    assert {event.rank for event in drawn} == {0, 1} and {event.step for event in drawn} <= set(range(1, 10))
    assert all(event.phase == KINDS[event.kind].phase for event in drawn if KINDS[event.kind].phase)
    steps = [event.step for event in events(0, 0)]
    assert steps == sorted(steps)


@pytest.mark.parametrize(
    ("step", "phase", "is_saving", "kind_phase", "due"),
    [
        (3, "train", False, "train", True),
        (2, "train", False, "train", False),  # a step too early
        (3, "sync", False, "train", False),
        (5, "sync", False, "train", False),
        (6, "sync", False, "train", True),  # the phase was not seen
        (3, "train", True, SAVING, True),
        (3, "train", False, SAVING, False),
    ],
)
def test_an_event_waits_for_its_step_and_phase(step, phase, is_saving, kind_phase, due):
    event = Event("kill-rank", 4, kind_phase, 1, 0.5)
    assert is_due(event, View(step, {0: 10, 1: 11}, {0: "wait", 1: phase}, is_saving)) is due
    assert not is_due(event, View(9, {}, {}, False))


def test_recovery_is_a_step_of_the_successors_or_where_the_run_lives_a_further_one():
    before = View(5, {0: 10, 1: 11}, {0: "train", 1: "train"}, False)
    survives, restarts = Recovery(before, KINDS["freeze"]), Recovery(before, KINDS["kill-rank"])
    assert [survives.is_seen(before._replace(step=step)) for step in (5, 6)] == [False, True]
    assert not restarts.is_seen(before._replace(step=6))  # SIGTERM lets the step end
    again = View(5, {0: 20, 1: 21}, {0: "start", 1: "start"}, False)
    assert not restarts.is_seen(again) and not restarts.is_seen(again._replace(pids={0: 20}, phases={0: "train"}))
    trains = again._replace(step=3, phases={0: "generate", 1: "train"})
    assert [restarts.is_seen(trains._replace(step=step)) for step in (3, 4)] == [False, True]
    assert (restarts.repeated, survives.repeated) == (2, 0)


def test_what_has_become_of_a_save_beside_training_is_known_at_the_next_save():
    before = View(5, {0: 10}, {0: "train"}, True)
    recovery = Recovery(before, KINDS["kill-saver"])
    assert not recovery.is_seen(before) and recovery.next_at is None
    assert not recovery.is_seen(before._replace(step=6)) and recovery.next_at is not None
    assert [recovery.is_seen(before._replace(step=step)) for step in (7, 8)] == [False, True]


def write_run(folder: Path, **changes) -> Path:
    """Write the outputs of a run of two steps, as far as they are compared. A change is a planted difference."""
    weights, steps = torch.ones(8), changes.get("steps", [0, 1, 2])
    if "bit" in changes:
        weights.view(torch.int32)[5] ^= 1 << changes["bit"]
    partial = folder / "checkpoints/step_000002.partial"
    (partial / "shards").mkdir(parents=True)
    write_state(partial, RunState(FORMAT, changes.get("train", TRAIN), {}, reference=False, adam_step=4.0))
    for rank, rows in enumerate(torch.split(weights, changes.get("split", 4))):
        offset = rank * changes.get("split", 4)
        block = CheckpointBlock("w", (8,), (offset,), rows.contiguous(), is_written=True, is_padded=False)
        snapshot = Snapshot([block])
        write_shard(partial / "shards", rank, snapshot.header, snapshot.slices, snapshot.pieces)
    publish(Publication(partial, partial.with_suffix(""), len(torch.split(weights, changes.get("split", 4))), 9), print)
    rows = [{"step": step, "loss": 0.1 * step, "time/step": os.urandom(1)[0]} for step in steps]
    rows[-1]["loss"] += changes.get("loss", 0)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "samples").mkdir()
    (folder / "samples/step_000001.jsonl").write_text(f"one\n{changes.get('sample', 'two')}\n")
    (folder / "hf/final").mkdir(parents=True)
    (folder / "hf/final/model.safetensors").write_text(changes.get("export", "weights"))
    return folder


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, []),
        ({"split": 2}, []),  # other shards of the same tensor
        ({"bit": 0}, ["step_000002: tensor w differs in byte 20: 00000001, not 00000000"]),
        ({"bit": 31}, ["step_000002: tensor w differs in byte 23: 10111111, not 00111111"]),
        ({"steps": [0, 1, 1, 2]}, ["metrics.jsonl has 2 rows of step 1"]),
        ({"steps": [0, 2]}, ["metrics.jsonl has no row of step 1"]),
        ({"steps": [1, 0, 2]}, ["metrics.jsonl has the steps [1, 0, 2], not [0, 1, 2]"]),
        ({"loss": 1e-16}, ["step 2: loss is 0.20000000000000012, not 0.2"]),
        ({"sample": "tow"}, ["samples/step_000001.jsonl differs in line 2"]),
        ({"sample": "two\nthree"}, ["samples/step_000001.jsonl differs in line 3"]),
        ({"export": "others"}, ["hf/final/model.safetensors differs"]),
    ],
)
def test_the_first_difference_of_each_kind_is_named(tmp_path, changes, told):
    expected, found = write_run(tmp_path / "expected"), write_run(tmp_path / "found", **changes)
    assert differences(expected, found) == told


def test_a_missing_checkpoint_and_another_data_position_are_differences(tmp_path):
    expected = write_run(tmp_path / "expected")
    moved = write_run(
        tmp_path / "found", train=TRAIN.__class__(2, 4, 2, {"epoch": 0, "offset": 9}, {}, {}, "seed: 0\n")
    )
    assert differences(expected, moved) == ["step_000002: state.json differs"]
    (moved / "checkpoints/step_000002").rename(moved / "checkpoints/step_000001")
    assert differences(expected, moved) == ["the last checkpoint is step_000001, not step_000002"]


def test_a_real_servers_run_is_compared_by_its_steps_alone(tmp_path):
    expected, found = write_run(tmp_path / "expected"), write_run(tmp_path / "found", steps=[0, 1], bit=3)
    assert differences(expected, found, bitwise=False) == ["metrics.jsonl has no row of step 2"]


def test_samples_of_a_full_disk_are_not_compared_but_those_of_other_steps_are(tmp_path):
    expected, found = write_run(tmp_path / "expected"), write_run(tmp_path / "found", sample="")
    assert differences(expected, found, without_samples={1}) == []
    assert differences(expected, found, without_samples={2}) == ["samples/step_000001.jsonl differs in line 2"]


def test_every_flipped_bit_is_one_that_a_checkpoint_must_notice(tmp_path):
    for number in range(25):
        checkpoint = write_run(tmp_path / str(number)) / "checkpoints/step_000002"
        before = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
        flipped = flip_bit(checkpoint, number / 25)
        changed = [path for path, content in before.items() if path.read_bytes() != content]
        assert changed == [flipped]
        (bits,) = [a ^ b for a, b in zip(before[flipped], flipped.read_bytes()) if a != b]
        assert bits.bit_count() == 1
        with pytest.raises(DapoError):
            check_stored(checkpoint)
            ShardReader(checkpoint / "shards").read("w", (0,), (8,))


def test_everything_that_a_run_leaves_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(places, "SHARED", tmp_path / "shared")
    run, temporary = tmp_path / "run", tmp_path / "tmp"
    for folder in (run / "checkpoints", temporary, tmp_path / "shared"):
        folder.mkdir(parents=True)
    (tmp_path / "shared/dapo_mcore-before").touch()
    known = places.shared_names()
    assert leftovers("none", run, temporary, known) == []
    (tmp_path / "shared/dapo_mcore-run").touch()
    (run / "checkpoints/step_000002.1a2b.partial").mkdir()
    (run / ".lock").touch()
    (temporary / "dapo_mcore-attempt-0").mkdir()
    sleeping = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"], env={MARK: "mine"})
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(run / "listens"))
        found = leftovers("mine", run, temporary, known)
    sleeping.kill()
    sleeping.wait()
    assert [line.split(f" {tmp_path}/")[-1] for line in found[1:]] == [
        "shared/dapo_mcore-run",
        "tmp/dapo_mcore-attempt-0",
        "run/.lock",
        "run/checkpoints/step_000002.1a2b.partial",
        "run/listens",
    ]
    assert found[0].startswith(f"process {sleeping.pid}: ")


def test_the_summary_counts_events_and_names_each_problem():
    outcomes = [
        Outcome("kill-rank", "step 3", status=1, exit_s=2.0, next_s=12.0, repeated=1),
        Outcome("kill-rank", "step 5", next_s=14.0, repeated=2),
        Outcome("kill-server", "step 5", left_out="no server runs"),
    ]
    rounds = [RoundResult(0, 0, 50.0, 2, outcomes, []), RoundResult(1, 3, 40.0, 1, [], ["round 1 differs"])]
    table = summary(rounds, reference_s=20.0).splitlines()
    assert table[1].split() == ["kill-rank", "2", "0", "1", "2.0", "13.0", "3"]
    assert table[2].split() == ["kill-server", "0", "1", "0", "-", "-", "0"]
    assert table[3] == "2 rounds, 3 starts of torchrun, 2 events, 3 steps done again, 50 s lost"
    assert table[4:] == ["round 1: round 1 differs", "NOT EQUAL: 1 of 2 rounds ended as the undisturbed run"]
    assert summary(rounds[:1], 20.0).endswith("\nEQUAL: 1 of 1 rounds ended as the undisturbed run")


def soak(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.soak", "--work", str(folder), *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


def test_an_unknown_event_is_refused_before_anything_runs(tmp_path):
    refused = soak(tmp_path, "--kinds", "kill-rank,kill-cat")
    assert (refused.returncode, list(tmp_path.iterdir())) == (2, [])
    assert refused.stderr.startswith("error: soak: event kill-cat is unknown; use kill-rank, ")


@pytest.mark.slow
def test_a_soak_of_four_events_ends_with_the_bits_of_the_undisturbed_run(tmp_path):
    done = soak(tmp_path, "--minutes", "0.1", "--kinds", "kill-rank,kill-saver,term,flip-byte", "--steps", "12")
    assert done.returncode == 0 and "EQUAL: 1 of 1 rounds" in done.stdout, done.stdout + done.stderr
    record = json.loads((tmp_path / "soak.json").read_text())
    (only,) = record["rounds"]
    assert {outcome["kind"] for outcome in only["outcomes"]} >= {"kill-rank", "kill-saver", "term", "flip-byte"}


@pytest.mark.parametrize("option", ["--minutes=0", "--minutes=nan", "--ranks=0", "--steps=1", "--events=0"])
def test_a_soak_that_would_try_nothing_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args([option])
    told = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and told.endswith("so nothing would be tried; give a larger number")


def test_a_folder_of_others_is_no_work_folder(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    (theirs / "tmp").mkdir(parents=True)
    with pytest.raises(CannotRun, match=r"is not empty, and no earlier soak has made it; give a new folder"):
        claim(theirs)
    assert (theirs / "tmp").is_dir() and not (theirs / ".soak").exists()
    for _ in range(2):
        claim(tmp_path / "new/soak")
    (tmp_path / "new/soak/tmp").mkdir()
    claim(tmp_path / "new/soak")
