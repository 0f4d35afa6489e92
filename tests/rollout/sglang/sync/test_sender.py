"""How the buckets of a stream get from the thread that gathers them to the event loop that sends them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from dapo_mcore.errors import RolloutError
from dapo_mcore.process.loop_thread import LoopThread
from dapo_mcore.rollout.sglang.sync.sender import BucketQueue


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    thread = LoopThread("test")
    yield thread
    thread.close()


Taken = list[tuple[Any, str | None]]


def sending(
    queue: BucketQueue, loop: LoopThread, at_each: Callable[[Taken], None] = lambda taken: None
) -> Future[Taken]:
    """Start an update that takes the buckets of `queue`. `at_each` is called when one has come and is not sent yet."""

    async def take() -> Taken:
        taken: Taken = []
        async for bucket in queue.buckets():
            taken.append(bucket)
            at_each(taken)
        return taken

    return loop.submit(take())


def stream(*items: str, log: list[str] | None = None) -> Iterator[tuple[str, bool]]:
    for item in items:
        if log is not None:
            log.append(f"gather {item}")
        yield item, item == items[-1]


def packing(log: list[str]) -> Callable[[str], str]:
    def pack(item: str) -> str:
        log.append(f"pack {item}")
        return item.upper()

    return pack


def test_buckets_come_packed_and_in_order_and_only_the_last_brings_the_version(loop):
    queue = BucketQueue("7-x", loop)
    update = sending(queue, loop)
    queue.feed(stream("a", "b", "c"), packing([]), update)
    assert update.result() == [("A", None), ("B", None), ("C", "7-x")]


def test_one_bucket_is_gathered_while_the_one_before_it_is_sent_and_packed_only_afterwards(loop):
    log: list[str] = []
    queue = BucketQueue("7-x", loop)
    update = sending(queue, loop, lambda taken: log.append(f"sent {taken[-1][0]}"))
    queue.feed(stream("a", "b", "c", log=log), packing(log), update)
    for one, next_one in (("a", "b"), ("b", "c")):
        assert log.index(f"pack {next_one}") > log.index(f"sent {one.upper()}")
    assert [line for line in log if line.startswith("gather")] == ["gather a", "gather b", "gather c"]


def test_an_update_that_ends_early_still_drains_the_stream_and_its_error_is_raised(loop):
    def fail(taken: Taken) -> None:
        if len(taken) == 2:
            raise RolloutError("no server is left")

    log: list[str] = []
    queue = BucketQueue("7-x", loop)
    with pytest.raises(RolloutError, match="no server is left"):
        queue.feed(stream(*"abcdef", log=log), packing(log), sending(queue, loop, fail))
    assert [line[-1] for line in log if line.startswith("gather")] == [*"abcdef"], "other ranks send what is in it"
    assert [line[-1] for line in log if line.startswith("pack")][:2] == ["a", "b"] and "pack f" not in log


def test_a_stream_that_breaks_off_breaks_the_update_off_and_raises_its_own_error(loop):
    def broken() -> Iterator[tuple[str, bool]]:
        yield "a", False
        raise ValueError("a rank is gone")

    queue = BucketQueue("7-x", loop)
    update = sending(queue, loop)
    with pytest.raises(ValueError, match="a rank is gone"):
        queue.feed(broken(), packing([]), update)
    with pytest.raises(RolloutError, match=r"the weight stream broke off: ValueError\('a rank is gone'\)"):
        update.result()
