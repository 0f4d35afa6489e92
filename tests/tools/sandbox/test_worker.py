"""A worker from outside: the bait of its canary, workers that do not start, answer late or lie."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from dapo_mcore.errors import ToolError
from dapo_mcore.tools.sandbox import mechanisms, worker
from dapo_mcore.tools.sandbox.inside import frames
from dapo_mcore.tools.sandbox.worker import Bait, Settings, Worker, WorkerLost
from tests.tools.sandbox.boxes import LIMITS

ROOT = Path(__file__).parents[3]


def start(monkeypatch: pytest.MonkeyPatch, code: str) -> Worker:
    """Start a worker whose box is this code. It must fail: the worker is closed in any case."""
    code = f"import json, sys; sys.path.insert(0, {str(ROOT)!r})\nfrom dapo_mcore.tools.sandbox.inside import frames\n{code}"
    monkeypatch.setitem(mechanisms.MECHANISMS, "fake", lambda settings: [sys.executable, "-c", code])

    async def once() -> None:
        await (await Worker.start("fake", Settings(LIMITS))).close()

    asyncio.run(once())


def test_the_last_line_of_a_worker_that_does_not_start_is_its_reason(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(WorkerLost, match="it has ended: ValueError: no walls"):
        start(monkeypatch, "raise ValueError('no walls')")


def test_a_worker_that_answers_nothing_is_lost_at_its_deadline(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(worker, "START_S", 0.3)
    with pytest.raises(WorkerLost, match=r"no answer within 0\.3 s"):
        start(monkeypatch, "import time; time.sleep(600)")


ANSWER = """
frames.send(1, {"ready": True})
request = frames.receive(0)
answer = {"ended": "exit", "status": 0, "tail": "", "left_out": 0, "seconds": 0, "cpu_seconds": 0}
"""


@pytest.mark.parametrize("head", ["''", "'all is well'", "request['code'][-1]"])
def test_a_canary_that_does_not_report_is_a_lost_worker(monkeypatch: pytest.MonkeyPatch, head: str):
    with pytest.raises(WorkerLost, match="a call cannot be walled in"):
        start(monkeypatch, f"{ANSWER}frames.send(1, {{**answer, 'head': {head}}})")


def test_an_attack_that_succeeds_ends_it_all(monkeypatch: pytest.MonkeyPatch):
    nonce = "request['code'].splitlines()[-1].split(\"'\")[1]"
    with pytest.raises(ToolError, match=r"the sandbox \(fake\) does not hold here: start_a_process succeeded"):
        start(monkeypatch, f"{ANSWER}frames.send(1, {{**answer, 'head': {nonce} + ' start_a_process'}})")


def test_the_bait_is_there_to_be_taken():
    with Bait() as bait:
        assert Path(bait["key_file"]).read_text()
        assert "/etc/passwd" in bait["hidden"]
        assert not any(
            path.startswith(hidden + "/") for hidden in bait["hidden"] for path in mechanisms.readable_paths()
        )
        assert bait["trainer"] == os.getpid()
    assert not Path(bait["key_file"]).exists()
    assert frames.encode(bait)
