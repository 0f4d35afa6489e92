"""Coroutines in a thread of their own: their results, and their end."""

from __future__ import annotations

import asyncio
from concurrent.futures import CancelledError
from threading import Event, current_thread

import pytest

from dapo_mcore.process.loop_thread import LoopThread


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
