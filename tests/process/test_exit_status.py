"""The message and status of a failing process. Statuses after signals are in test_signals.py."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from dapo_mcore.process.exit_status import exit_status, is_lost_rank, record_failure


def test_torchrun_shows_the_message_of_the_rank_that_failed_first(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    assert not record_failure("nobody asks")
    failures = {}
    for rank, message in {0: "another rank has ended", 5: "no data file at nowhere.jsonl"}.items():
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", path := str(tmp_path / f"{rank}.json"))
        assert record_failure(message, is_consequence=rank == 0)
        failures[rank] = ProcessFailure(local_rank=rank, pid=7 + rank, exitcode=2, error_file=path)
    error = ChildFailedError("train", failures)
    assert error.get_first_failure()[0] == 5
    assert str(error).rstrip("=\n").endswith("traceback : no data file at nowhere.jsonl")


def test_a_rank_that_is_killed_while_it_writes_its_message_leaves_no_half_of_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", path := str(tmp_path / "error.json"))
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        record_failure("the disk is full")
    assert not os.path.exists(path)
    monkeypatch.undo()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", os.devnull)
    assert record_failure("the disk is full") and not os.path.isfile(os.devnull)


def test_the_loss_of_another_rank_is_distinguished_from_other_errors():
    assert is_lost_rank(
        RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:1")
    )
    assert not is_lost_rank(RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:9] Timed out waiting 1800000ms"))
    assert not is_lost_rank(ValueError("Connection closed by peer"))


def test_the_loss_of_another_rank_is_told_without_the_advice_of_gloo(capsys, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    where = "[third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:19338: "

    def lose():
        raise RuntimeError(
            f"{where}Connection reset by peer. This is typically caused by a remote worker hanging. GLHF!"
        )

    assert exit_status(lose) == 2
    assert capsys.readouterr().err == (
        "error: another rank has ended, and its error is the cause; this one has lost the connection (Connection reset by peer)\n"
    )


def test_a_refusal_of_the_operating_system_is_one_line_and_other_errors_keep_their_traceback(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    (tmp_path / "file").touch()
    assert exit_status(lambda: (tmp_path / "file" / "run").mkdir()) == 2
    told = (
        f"error: cannot go on: Not a directory: {tmp_path}/file/run; a file is in the place of a folder: move it away, "
    )
    assert capsys.readouterr().err.startswith(told)

    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert exit_status(full) == 2
    assert capsys.readouterr().err.startswith("error: cannot go on: No space left on device; free some space there")
    with pytest.raises(ConnectionResetError):
        exit_status(lambda: (_ for _ in ()).throw(ConnectionResetError(errno.ECONNRESET, "reset")))


def test_a_rank_that_has_waited_too_long_says_for_whom_and_what_to_do(capsys, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    store, options = dist.HashStore(), dist.AllreduceOptions()
    options.timeout = timedelta(seconds=0.1)
    with ThreadPoolExecutor(2) as pool:
        group, other = pool.map(lambda rank: dist.ProcessGroupGloo(store, rank, 2, timedelta(minutes=1)), range(2))
    for _ in range(2):  # the second time gloo has closed the connection
        assert exit_status(lambda: group.allreduce([torch.ones(1)], options).wait()) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: this rank has waited parallel.timeout_minutes in vain for another one"), told
        assert told.count("\n") == 1 and other is not None, told
