"""Coroutines in a thread of their own: their results, and their end."""

from __future__ import annotations

import asyncio
from concurrent.futures import CancelledError
from threading import Event, current_thread

import pytest

from dapo_mcore.process.loop_thread import LoopThread, gather_all


async def name_of_thread() -> str:
    return current_thread().name


async def forever(ended: Event) -> None:
    try:
        await asyncio.sleep(3600)
    finally:
        ended.set()


def test_coroutines_run_in_the_thread_until_it_is_closed():
    loop, ended = LoopThread("there"), Event()
    assert loop.run(name_of_thread()) == loop.submit(name_of_thread()).result(60) == "there"
    future = loop.submit(forever(ended))
    loop.close()
    assert ended.wait(60)
    with pytest.raises(CancelledError):
        future.result(60)
    loop.close()


async def add(a: int, b: int) -> int:
    await asyncio.sleep(0)
    return a + b


async def fail() -> int:
    raise ValueError("one of them")


def test_gathered_coroutines_give_their_results_in_order() -> None:
    assert asyncio.run(gather_all(add(number, 1) for number in range(3))) == [1, 2, 3]


def test_an_error_of_one_ends_the_others_first() -> None:
    ended = Event()
    with pytest.raises(ValueError, match="one of them"):
        asyncio.run(gather_all([forever(ended), fail()]))
    assert ended.is_set()
