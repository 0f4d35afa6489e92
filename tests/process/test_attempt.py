"""Ranks that find each other in a store that dead attempts have used, and starts that lead nowhere.

test_watchdog.py shows that a job which torchrun starts again goes on.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from dapo_mcore.errors import OtherRankFailed, RestartError
from dapo_mcore.process.attempt import call_roll, check_progress


def roll(store: Any, ranks: range, size: int = 4, timeout_s: float = 30.0) -> list[str]:
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: call_roll(store, rank, size, timeout_s), ranks))


def test_every_attempt_on_one_store_has_a_name_of_its_own_that_all_ranks_know() -> None:
    store = dist.HashStore()
    first, second = roll(store, range(4)), roll(store, range(4))
    assert len(set(first)) == len(set(second)) == 1 and first[0] != second[0]


def test_what_dead_ranks_have_written_is_neither_believed_nor_waited_for() -> None:
    store = dist.HashStore()
    store.set("roll/dead/complete", "")
    for rank in range(1, 4):
        store.set(f"roll/{rank}", f"dead{rank}")
        store.set(f"roll/{rank}/answer", f"dead{rank} dead")
        store.set(f"roll/dead/{rank}", f"dead{rank}")
    (name,) = set(roll(store, range(4)))
    assert name != "dead"


def test_a_rank_0_that_dies_in_the_roll_call_has_a_successor() -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(call_roll, store, 1, 3, 30.0)
        with pytest.raises(OtherRankFailed, match=r"1 of 3 ranks have not joined the job within 0\.5 s: 2; their logs"):
            call_roll(store, 0, 3, 0.5)
        others = [pool.submit(call_roll, store, rank, 3, 30.0) for rank in (0, 2)]
        assert len({rank.result() for rank in (first, *others)}) == 1


def test_rank_0_names_the_ranks_that_do_not_come_and_the_others_end_too() -> None:
    with pytest.raises(
        OtherRankFailed, match=r"11 of 12 ranks have not joined the job within 0 s: 1, .*, 8 and 3 more;"
    ):
        call_roll(dist.HashStore(), 0, 12, 0.0)
    with pytest.raises(
        OtherRankFailed, match=r"the 2 ranks of this job have not found each other within 0\.1 s; rank 0 names"
    ):
        call_roll(dist.HashStore(), 1, 2, 0.1)


def launched(logs: Path, restart: int) -> dict[str, str]:
    error_file = logs / f"attempt_{restart}" / "0" / "error.json"
    error_file.parent.mkdir(parents=True)
    counts = {"TORCHELASTIC_RESTART_COUNT": str(restart), "TORCHELASTIC_MAX_RESTARTS": "9"}
    return {"TORCHELASTIC_ERROR_FILE": str(error_file), **counts}


def test_the_third_start_from_one_checkpoint_ends_with_the_error_of_the_second(tmp_path: Path) -> None:
    for restart, checkpoint in enumerate(["nothing", "step_000002", "step_000002"]):
        check_progress(launched(tmp_path, restart), checkpoint)
    info = {"timestamp": "1", "rank": "3", "is_consequence": False}
    told = tmp_path / "attempt_2/1/error.json"
    told.parent.mkdir()
    told.write_text(json.dumps({"message": {"message": "the disk is full", "extraInfo": info}}))
    third = launched(tmp_path, 3)
    message = "2 starts from step_000002 have failed, so there is no third one; the last: rank 3: the disk is full"
    with pytest.raises(RestartError, match=message):
        check_progress(third, "step_000002")
    refused = tmp_path / "attempt_3/0/error.json"
    refused.write_text(json.dumps({"message": {"message": message, "extraInfo": info | {"rank": "0"}}}))
    with pytest.raises(RestartError, match=f"{message}\\. Mend that"):
        check_progress(launched(tmp_path, 4), "step_000002")
    check_progress(third, "step_000004")


def test_a_job_that_is_never_started_again_leaves_no_notes(tmp_path: Path) -> None:
    for environment in ({}, launched(tmp_path, 0) | {"TORCHELASTIC_MAX_RESTARTS": "0"}):
        for _ in range(3):
            check_progress(environment, "step_000002")
    assert [path.name for path in tmp_path.iterdir()] == ["attempt_0"]
