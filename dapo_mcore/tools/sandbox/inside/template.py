"""A process that loads modules once and forks a cell for each call. It never runs model-written code itself.

Change here: what happens between a request and its answer. `worker.py` outside starts this process and talks to it.
"""

from __future__ import annotations

import codecs
import gc
import importlib
import os
import resource
import select
import signal
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from dapo_mcore.tools.sandbox.inside import cell, frames, kernel, run_code

OUTPUT_FLOOD = 16 << 20
"""Bytes of output after which a call is ended: what is beyond the limit of a request is read and thrown away until then."""
_ENTERED = b"+"
_OPEN_FILES = 256


@dataclass(slots=True)
class _Output:
    """The beginning and the end of what a call has printed, at most `limit` bytes each."""

    limit: int
    size: int = 0
    head: bytearray = field(default_factory=bytearray)
    tail: bytearray = field(default_factory=bytearray)

    def add(self, data: bytes) -> None:
        self.size += len(data)
        room = self.limit - len(self.head)
        self.head += data[:room]
        self.tail += data[room:] if room < len(data) else b""
        if len(self.tail) > self.limit:
            del self.tail[: -self.limit]


def serve(settings: dict[str, Any]) -> None:
    """Load the modules, report that, and answer requests from standard input on standard output until it closes.

    A request is {code, timeout_s, output_bytes}; null cancels the one that runs. The answer is {ended, status, head, tail,
    left_out, seconds, cpu_seconds}: `ended` is exit, signal, timeout, flood, cancel, or no cell with the reason in `head`.
    """
    resource.setrlimit(resource.RLIMIT_NOFILE, (_OPEN_FILES, _OPEN_FILES))
    requests, answers = os.dup(0), os.dup(1)
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)  # modules that print while they load must not disturb the answers
    os.close(null)
    try:
        for name in settings["preload"]:
            importlib.import_module(name)
        if "numpy" in sys.modules:
            importlib.import_module("numpy.random")  # numpy loads it late, and every cell needs it
    except BaseException as error:
        frames.send(answers, {"error": f"preload: {type(error).__name__}: {error}"})
        return
    gc.collect()
    gc.freeze()  # a cell's garbage collection must not copy the pages that it shares with this process
    own_namespace = kernel.open_process(os.getpid())
    frames.send(answers, {"ready": True})
    while True:
        try:
            request = frames.receive(requests)
        except EOFError:
            return
        if request is not None:
            frames.send(answers, _run_in_cell(request, settings, requests, own_namespace))


def _run_in_cell(request: dict[str, Any], settings: dict[str, Any], requests: int, namespace: int) -> dict[str, Any]:
    output_end, output = os.pipe()
    report_end, report = os.pipe()
    start = time.monotonic()
    kernel.enter_namespace(namespace, kernel.CLONE_NEWPID)  # else the next namespace would be within the last one
    kernel.unshare(kernel.CLONE_NEWPID)
    pid = os.fork()
    if pid == 0:
        _be_cell(request["code"], settings, output, report)
    os.close(output)
    os.close(report)
    ended, printed = _watch(pid, output_end, requests, start + request["timeout_s"], request["output_bytes"])
    _, status, usage = os.wait4(pid, 0)
    seconds = time.monotonic() - start
    answer = _answer(ended, status, printed, os.read(report_end, 4096))
    os.close(output_end)
    os.close(report_end)
    return {**answer, "seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime}


def _be_cell(code: str, settings: dict[str, Any], output: int, report: int) -> None:
    """Run the code in this forked process and end it.

    `report` is closed before the code runs, so that only this function can say whether the walls stand.
    """
    status = 1
    try:
        try:
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.dup2(report, 3)
            os.closerange(4, _OPEN_FILES)
            cell.enter(cell.Limits(**settings["limits"]), settings["readable"], settings["needs_landlock"])
        except BaseException as error:
            os.write(3, f"{type(error).__name__}: {error}".encode()[:4000])
            os._exit(1)
        os.write(3, _ENTERED)
        os.close(3)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed()  # Python's own generator does it at every fork
        status = run_code.run(code)
    finally:
        os._exit(status & 0xFF)


def _watch(pid: int, output: int, requests: int, deadline: float, limit: int) -> tuple[str, _Output]:
    """Read what the cell prints until it ends, and kill it at the deadline. Return how it ended and what it printed."""
    printed = _Output(limit)
    process = kernel.open_process(pid)
    poll = select.poll()
    for fd in (process, output, requests):
        poll.register(fd, select.POLLIN)
    ended = None
    while ended is None:
        ready = {fd for fd, _ in poll.poll(max(0.0, (deadline - time.monotonic()) * 1000))}
        if output in ready and not _read_some(output, printed):
            poll.unregister(output)  # the code has closed its standard output
        if requests in ready:  # the trainer cancels the call, or has closed the pipe
            ended = "cancel"
        elif process in ready and output not in ready:
            ended = "end"
        elif time.monotonic() >= deadline:
            ended = "timeout"
        elif printed.size > OUTPUT_FLOOD:
            ended = "flood"
    os.close(process)
    if ended != "end":
        os.kill(pid, signal.SIGKILL)  # the first process of its namespace: the kernel kills all others in it
    return ended, printed


def _read_some(fd: int, printed: _Output) -> bool:
    """Add what can be read at once. Return False at the end of the pipe."""
    data = os.read(fd, 1 << 16)
    printed.add(data)
    return bool(data)


def _answer(ended: str, status: int, printed: _Output, report: bytes) -> dict[str, Any]:
    if report != _ENTERED and ended == "end":
        return {"ended": "no cell", "status": 0, "head": _text(report), "tail": "", "left_out": 0}
    by_signal = os.WIFSIGNALED(status)
    if ended == "end":
        ended = "signal" if by_signal else "exit"
    return {
        "ended": ended,
        "status": os.WTERMSIG(status) if by_signal else os.WEXITSTATUS(status),
        "head": _text(printed.head),
        "tail": _text(printed.tail),
        "left_out": printed.size - len(printed.head) - len(printed.tail),
    }


def _text(data: bytes) -> str:
    """Return the bytes as text. Whatever is no UTF-8, such as a character that is cut in two, becomes U+FFFD."""
    return codecs.decode(bytes(data), "utf-8", "replace")
