"""What a worker process sends to the pool, played by a thread of this process."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from dapo_mcore.reward.attempt import Attempt
from dapo_mcore.reward.worker import serve

ZOO = Path(__file__).with_name("plugin_zoo.py")


@contextmanager
def worker(function: str) -> Iterator[tuple[Connection, int]]:
    """The pool's end of the pipe, and the worker's descriptor. The worker must end once the pool's end is closed."""
    ours, theirs = Pipe()
    descriptor = os.dup(theirs.fileno())  # the worker closes its own
    theirs.close()
    os.set_inheritable(descriptor, True)  # as RewardPool hands it over
    arguments = (descriptor, {"function": f"{ZOO}:{function}"}, 60.0)
    thread = threading.Thread(target=serve, args=arguments, daemon=True)
    thread.start()
    with ours:
        yield ours, descriptor
    thread.join(timeout=60)
    assert not thread.is_alive()


def answer(connection: Connection) -> dict[str, Any]:
    assert connection.poll(60)
    return json.loads(connection.recv_bytes())


def test_a_worker_says_that_it_is_ready_and_answers_each_attempt_in_turn():
    with worker("by_text") as (pool, _):
        assert answer(pool) == {"ready": True}
        pool.send(Attempt("q", "score 2", "a"))
        assert answer(pool) == {"score": 2.0, "acc": True, "pred": "", "failure": None}
        pool.send(Attempt("q", "raise no", "a"))
        pool.send(Attempt("q", "leave 3", "a"))
        assert answer(pool)["failure"] == "exception: ValueError: no"
        assert answer(pool)["failure"] == "exception: SystemExit: 3"


def test_a_function_that_cannot_be_loaded_is_the_first_and_only_answer():
    with worker("absent") as (pool, _):
        assert "has no function 'absent'" in answer(pool)["error"]
        assert pool.poll(60)
        with pytest.raises(EOFError):
            pool.recv_bytes()


def test_children_of_the_reward_function_do_not_inherit_the_pipe():
    with worker("by_text") as (pool, descriptor):
        assert answer(pool) == {"ready": True}
        assert not os.get_inheritable(descriptor)
