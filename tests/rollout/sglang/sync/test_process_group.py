"""Rank 0 of a process group without any servers: which address it listens at, and how waits end."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta

import psutil
import pytest
import torch

from dapo_mcore.rollout.sglang.sync.process_group import RootRank, in_daemon
from tests.rollout.sglang.serving import wait_for


def root(name: str, world_size: int) -> RootRank:
    return RootRank(name, "127.0.0.1", world_size, "gloo", timedelta(seconds=30))


@pytest.fixture
def alone() -> Iterator[RootRank]:
    """Return an open group of rank 0 alone."""
    group = root("alone", 1)
    group.open()
    yield group
    group.close()


def test_rank_0_listens_at_the_given_address_alone():
    group = root("here", 2)
    socket.create_connection(("127.0.0.1", group.port), 5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", group.port), 5)


def test_after_closing_a_broadcast_is_refused(alone):
    alone.broadcast([("a", torch.zeros(1))])
    for _ in range(2):
        alone.close()
    with pytest.raises(RuntimeError, match="process group alone is closed"):
        alone.broadcast([("a", torch.zeros(1))])


def num_connections(port: int) -> int:
    found = psutil.net_connections("tcp")
    return sum(connection.laddr.port == port and connection.status == "ESTABLISHED" for connection in found)


def test_closing_ends_the_wait_for_a_rank_that_never_comes():
    group, errors = root("waits", 2), []

    def open_in_vain() -> None:
        with pytest.raises(RuntimeError) as caught:
            group.open()
        errors.append(caught.value)

    opening = threading.Thread(target=open_in_vain, daemon=True)
    opening.start()
    wait_for(lambda: num_connections(group.port) >= 2, 20)  # the store and our client of it
    group.close_soon().join(20)
    opening.join(20)
    assert len(errors) == 1


def test_a_group_that_was_given_up_before_it_opened_does_not_open():
    group = root("never", 1)
    group.close()
    with pytest.raises(RuntimeError, match="process group never was given up"):
        group.open()


def test_a_call_in_a_daemon_thread_gives_its_result_or_its_error():
    def where(number: int) -> tuple[int, bool]:
        return number, threading.current_thread().daemon

    async def run() -> tuple[int, bool]:
        with pytest.raises(ZeroDivisionError):
            await in_daemon(lambda: 1 // 0)
        return await in_daemon(where, 3)

    assert asyncio.run(run()) == (3, True)
