"""Sandboxes for tests: which mechanisms work on this machine, and calls in one of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import cache
from typing import TypeVar

import pytest

from dapo_mcore.errors import ToolError
from dapo_mcore.tools.sandbox.inside.cell import Limits
from dapo_mcore.tools.sandbox.mechanisms import MECHANISMS
from dapo_mcore.tools.sandbox.pool import SandboxPool
from dapo_mcore.tools.sandbox.worker import Ending, Settings

T = TypeVar("T")

LIMITS = Limits(cpu_s=20, memory_mib=512, disk_mib=8, threads=16)
EACH_MECHANISM = pytest.mark.parametrize("mechanism", MECHANISMS)


def in_pool(
    mechanism: str, use: Callable[[SandboxPool], Awaitable[T]], num_workers: int = 2, limits: Limits = LIMITS
) -> T:
    """Return what `use` gives with a started pool. Skip the test if the mechanism cannot be used here."""
    if reason := _missing(mechanism):
        pytest.skip(reason)
    return asyncio.run(_with_pool(mechanism, use, num_workers, limits))


def skip_without_sandbox() -> None:
    """Skip the test if no mechanism works here."""
    if reason := _missing("auto"):
        pytest.skip(reason)


def run(mechanism: str, *codes: str, timeout_s: float = 30.0, output_bytes: int = 2000) -> list[Ending]:
    """Return how the codes end, one after another in one worker."""

    async def one_by_one(pool: SandboxPool) -> list[Ending]:
        return [await pool.run(code, timeout_s, output_bytes) for code in codes]

    return in_pool(mechanism, one_by_one, num_workers=1)


@cache
def _missing(mechanism: str) -> str:
    """Return why the machine lacks the mechanism. A breach is no reason to skip: it fails the test."""

    async def nothing(pool: SandboxPool) -> None: ...

    try:
        asyncio.run(_with_pool(mechanism, nothing, 1, LIMITS))
    except ToolError as error:
        if "no sandbox works here" not in str(error):
            raise
        return str(error)
    return ""


async def _with_pool(mechanism: str, use: Callable[[SandboxPool], Awaitable[T]], num_workers: int, limits: Limits) -> T:
    pool = SandboxPool(mechanism, num_workers, Settings(limits))
    try:
        await pool.start()
        return await use(pool)
    finally:
        await pool.close()
