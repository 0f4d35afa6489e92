"""The failure of a job that is told first."""

from __future__ import annotations

from pathlib import Path

import pytest

from dapo_mcore.process.exit_status import record_failure
from dapo_mcore.process.failures import find_failures, main

REPORT = """
dapo_mcore.train FAILED
Failures:
[1]:
  time      : 2026-11-27_12:56:32
  host      : localhost
  rank      : 9 (local_rank: 1)
  exitcode  : -15 (pid: 7613)  (SIGTERM)
  error_file: <N/A>
  traceback : Signal 15 (SIGTERM) received by PID 7613
Root Cause (first observed failure):
[0]:
  time      : 2026-11-27_12:56:33
  host      : localhost
  rank      : 8 (local_rank: 0)
  exitcode  : -9 (pid: 7612)  (SIGKILL)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 7612
"""


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    (tmp_path / "n1").mkdir()
    (tmp_path / "n1/torchrun.log").write_text(REPORT)
    return tmp_path


def tell(
    monkeypatch: pytest.MonkeyPatch,
    logs: Path,
    node: str,
    rank: int,
    message: str,
    *,
    consequence: bool,
    attempt: int = 0,
) -> None:
    file = logs / node / f"1.0_x/attempt_{attempt}/{rank}/error.json"
    file.parent.mkdir(parents=True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setenv("RANK", str(rank))
    assert record_failure(message, consequence)


def test_a_killed_rank_is_the_cause_before_the_ranks_that_lost_it(logs, monkeypatch, capsys) -> None:
    tell(monkeypatch, logs, "n0", 3, "another rank has ended", consequence=True)
    assert [failure.rank for failure in find_failures(logs)] == ["8", "9", "3"]
    assert main(str(logs)) == 0
    assert capsys.readouterr().out == "failed first: node n1, rank 8: Signal 9 (SIGKILL) received by PID 7612\n"


def test_a_rank_that_tells_an_older_error_is_the_cause(logs, monkeypatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1.0)
    tell(monkeypatch, logs, "n0", 3, "the disk is full", consequence=False)
    assert str(find_failures(logs)[0]) == "node n0, rank 3: the disk is full"


def test_a_torchrun_that_was_killed_is_the_cause_and_one_that_tells_of_its_ranks_is_none(logs, monkeypatch) -> None:
    tell(monkeypatch, logs, "n0", 3, "another rank has ended", consequence=True)
    waited = "DistStoreError: 1/2 clients joined\n"
    for node, said in (("n0", f"{waited}torchrun ended with status 1\n"), ("n1", "torchrun ended with status 137\n")):
        (logs / node / "torchrun.log").write_text(said)
    assert [str(failure) for failure in find_failures(logs)] == [
        "node n1: torchrun was ended by SIGKILL",
        "node n0, rank 3: another rank has ended",
        "node n0: torchrun ended with status 1: DistStoreError: 1/2 clients joined",
    ]


def test_of_several_attempts_the_last_one_counts(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1.0)
    for attempt, message in ((9, "a link is down"), (10, "the disk is full")):
        tell(monkeypatch, tmp_path, "n0", 3, message, consequence=False, attempt=attempt)
    assert [failure.message for failure in find_failures(tmp_path)] == ["the disk is full"]


def test_a_job_without_a_message_and_a_message_that_was_cut_off_are_no_error(tmp_path, capsys) -> None:
    (tmp_path / "n0/0").mkdir(parents=True)
    (tmp_path / "n0/0/error.json").write_text('{"message": {"mess')
    assert main(str(tmp_path)) == 1
    assert capsys.readouterr().out == "neither a rank nor a torchrun has said why it ended\n"
