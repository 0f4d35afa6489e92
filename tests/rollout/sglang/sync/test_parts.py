"""The parts of a stream from two leaders as one, without servers: every bucket once, one check over all, limits of time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from threading import Thread
from typing import Any

import pytest
import torch

from dapo_mcore.architecture.manifest import StreamCheck, WeightManifest, buckets
from dapo_mcore.errors import RolloutError
from dapo_mcore.rollout.sglang.client.http import RequestFailed
from dapo_mcore.rollout.sglang.sync.leader import Leader
from dapo_mcore.rollout.sglang.sync.parts import OtherLeaders, Outgoing
from tests.rollout.sglang.leading import TOKEN, new_leader

NAMES = ["a", "b", "c", "d"]
MANIFEST = WeightManifest({name: torch.Size([2]) for name in NAMES}, {})
Sent = list[tuple[list[str], int, str | None]]


@pytest.fixture
def leader() -> Iterator[Leader]:
    made = new_leader(timeout_s=5.0)
    yield made
    made.close()


def part(*names: str, size: int = 2) -> list[tuple[str, torch.Tensor]]:
    return [(name, torch.ones(size)) for name in names]


def join(leader: Leader, own: list[Any], theirs: list[Any], timeout_s: float = 30.0) -> Sent:
    """Return names, leader and version of every bucket of the sync, in order. The leader serves in a thread."""
    others, check = OtherLeaders([leader.url], TOKEN, timeout_s), StreamCheck(MANIFEST, 7)
    others._sync = leader._sync  # leaders of earlier syncs of a test
    others.begin()
    serving = Thread(target=leader.serve, args=(iter(theirs),), daemon=True)
    serving.start()
    sent: Sent = []

    async def ours() -> AsyncIterator[tuple[Outgoing, str | None]]:
        for bucket, last in buckets(check.passing(iter(own)), 0):
            yield Outgoing(bucket), "7-x" if last else None

    async def take() -> None:
        async for outgoing, version in others.join(ours(), check, "7-x"):
            assert not outgoing.leader or outgoing.bucket[0][1].is_meta
            sent.append(([name for name, _ in outgoing.bucket], outgoing.leader, version))

    try:
        asyncio.run(take())
    finally:
        others.dismiss()
        serving.join(30)
    assert others.num_bytes == sum(8 for _, number, _ in sent if number)
    return sent


def test_every_bucket_comes_once_from_its_leader_and_the_last_of_all_brings_the_version(leader):
    sent = join(leader, part("a"), part("b", "c", "d"))
    assert sorted((name, number) for (name,), number, _ in sent) == [("a", 0), ("b", 1), ("c", 1), ("d", 1)]
    assert [version for *_, version in sent] == [None, None, None, "7-x"]
    assert [name for (name,), number, _ in sent if number] == ["b", "c", "d"]


@pytest.mark.parametrize(
    ("own", "theirs", "message"),
    [
        (part("a", "b"), part("b", "c", "d"), "b came twice"),
        (part("a", "b"), part("c"), "weight version 7 lacks 1 of 4 tensors: d"),
        (part("a", "b"), [*part("c"), *part("d", size=3)], r"d has shape \[3\], but \[2\] in the model"),
        (part("a", "b"), part("c", "d", "e"), "e is not in the model"),
    ],
)
def test_parts_that_do_not_make_up_the_model_are_refused_before_the_last_bucket(leader, own, theirs, message):
    with pytest.raises(RolloutError, match=message):
        raise AssertionError(join(leader, own, theirs))


def test_a_leader_that_is_silent_or_gone_ends_the_sync(leader):
    idle = new_leader(timeout_s=5.0)
    others = OtherLeaders([idle.url], TOKEN, 0.3)

    async def nothing() -> AsyncIterator[Any]:
        await asyncio.sleep(60)
        yield

    async def take(others: OtherLeaders) -> None:
        others.begin()
        async for _ in others.join(nothing(), StreamCheck(MANIFEST, 7), "7-x"):
            raise AssertionError("nobody sends")

    with pytest.raises(RolloutError, match=r"no leader has gathered its next bucket within 0\.3 s"):
        asyncio.run(take(others))
    idle.close()
    with pytest.raises(RequestFailed, match=f"a leader of the weight sync, {idle.url}, does not answer: .*refused"):
        asyncio.run(take(others))
    with pytest.raises(RequestFailed, match="does not answer"):
        others.dismiss()
