"""What another process reads of a rank."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from dapo_mcore.process.beacon import DUMP, Beacon, BeaconReader, NullBeacon, error_file_of, remove_dead, stack_file


def test_a_beacon_tells_phase_collective_and_progress(tmp_path: Path) -> None:
    beacon = Beacon(tmp_path, 3, "/logs/ü/error.json")
    assert error_file_of(tmp_path, 3) == "/logs/ü/error.json"
    with beacon.phase("train"):
        with beacon.waits("broadcast"):
            (note,) = BeaconReader(tmp_path).read()
            assert note[:4] == (os.getpid(), 3, 1, 0)
            assert (note.phase, note.waits_for) == ("train", "broadcast") and note.since <= time.monotonic()
        with beacon.phase("save"):
            beacon.tick()
            (later,) = BeaconReader(tmp_path).read()
            assert (later.phase, later.waits_for, later.num_waits, later.ticks) == ("save", "", 1, 1)
            assert later.since >= note.since
        assert BeaconReader(tmp_path).read()[0].phase == "train"
    reader = BeaconReader(tmp_path)
    assert reader.read()[0].phase == ""
    (tmp_path / "3.beacon").unlink()  # as by a cleaner of old files
    beacon.leave()
    assert reader.read()[0].phase == "left"


def test_a_note_that_changes_all_the_time_is_read_whole(tmp_path: Path) -> None:
    beacon, done = Beacon(tmp_path, 0), threading.Event()
    reader = BeaconReader(tmp_path)

    def change() -> None:
        while not done.is_set():
            for name in ("aaaaaaaa", "bbbbbbbb"):
                with beacon.phase(name), beacon.waits(name):
                    pass

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(300):
            for note in reader.read():
                assert note.phase in ("", "aaaaaaaa", "bbbbbbbb") and note.waits_for in ("", note.phase)
    finally:
        done.set()
        thread.join()


def test_a_signal_writes_the_stacks(tmp_path: Path) -> None:
    Beacon(tmp_path, 0)
    os.kill(os.getpid(), DUMP)
    text = stack_file(tmp_path, 0).read_text()
    assert "most recent call first" in text and "test_a_signal_writes_the_stacks" in text


def test_a_job_that_nobody_watches_has_a_beacon_that_does_nothing() -> None:
    beacon = NullBeacon()
    with beacon.phase("train"), beacon.waits("barrier"):
        beacon.tick()
    beacon.leave()


RANK = """
import sys, time
from pathlib import Path
from dapo_mcore.process.beacon import Beacon
beacon = Beacon(Path(sys.argv[1]), int(sys.argv[2]))
print("there", flush=True)
time.sleep(600)
"""


def test_beacons_are_deleted_once_all_their_ranks_have_been_killed(tmp_path: Path) -> None:
    dead, empty = tmp_path / "dapo_mcore-1234-0", tmp_path / "dapo_mcore-node-5"
    dead.mkdir()
    empty.mkdir()
    command = [sys.executable, "-c", RANK, str(dead)]
    ranks = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE) for rank in (0, 1)]
    for rank in ranks:
        assert rank.stdout.readline() == b"there\n"
    left = []
    for rank in ranks:
        remove_dead(tmp_path.iterdir())
        left.append(dead.exists())
        rank.kill()
        rank.communicate()
    remove_dead(tmp_path.iterdir())
    assert left == [True, True] and list(tmp_path.iterdir()) == [empty]
