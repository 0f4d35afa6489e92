"""The process that forks cells: what it keeps of an output, and its answers. The whole of it runs in test_pool.py."""

from __future__ import annotations

import os
import signal

from dapo_mcore.tools.sandbox.inside.template import _answer, _Output


def test_output_keeps_its_beginning_and_its_end():
    output = _Output(limit=4)
    for part in (b"ab", b"cde", b"", b"fghij", b"k"):
        output.add(part)
    assert (bytes(output.head), bytes(output.tail), output.size) == (b"abcd", b"hijk", 11)
    short = _Output(limit=4)
    short.add(b"abcdef")
    assert (bytes(short.head), bytes(short.tail)) == (b"abcd", b"ef")


def test_an_answer_says_how_the_cell_ended():
    printed = _Output(limit=2)
    printed.add("xé€".encode())
    done = _answer("end", 3 << 8, printed, b"+")
    assert (done["ended"], done["status"], done["left_out"]) == ("exit", 3, 2)
    assert done["head"] == "x\N{REPLACEMENT CHARACTER}"
    crashed = _answer("end", signal.SIGSEGV, printed, b"+")
    assert (crashed["ended"], crashed["status"]) == ("signal", signal.SIGSEGV)
    assert _answer("timeout", signal.SIGKILL, printed, b"+")["ended"] == "timeout"


def test_a_cell_that_was_not_walled_in_has_run_nothing():
    refused = _answer("end", 1 << 8, _Output(2), b"OSError: unshare: Operation not permitted")
    assert (refused["ended"], refused["head"]) == ("no cell", "OSError: unshare: Operation not permitted")
    assert _answer("end", os.WEXITSTATUS(0), _Output(2), b"")["ended"] == "no cell"
