"""Faults that a test orders at a fake server: requests that fail in one way or another."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web


@dataclass
class Fault:
    """A fault in the next `count` uses of `where`, after `after` uses without one. `where` is a path, `weights`, `version`, or
    `bucket 5` (counted from 1 in each update). With `version` only uses under weights of this version of a run count."""

    kind: str
    where: str = "/generate"
    count: int = 1
    value: Any = None
    after: int = 0
    version: int | None = None


class Faults:
    """The faults that are ordered. `told` counts those that have happened."""

    def __init__(self, told: Counter[str], weight_version: Callable[[], str]):
        self.told, self.ordered = told, ordered_in_file(os.environ.get("FAKE_FAULTS"))
        self.weight_version = weight_version
        self.answer: asyncio.Task[web.Response] | None = None

    def order(self, **fault: Any) -> None:
        self.ordered.append(Fault(**fault))

    def take(self, where: str) -> Fault | None:
        """Return the fault of this use of `where`, or None."""
        version = self.weight_version().partition("-")[0]  # SGLangEngine adds a random part
        for fault in self.ordered:
            if fault.version is not None and version != str(fault.version):
                continue
            if fault.where == where and fault.after > 0:
                fault.after -= 1
            elif fault.where == where and fault.count > 0:
                fault.count -= 1
                self.told[f"fault {fault.kind}"] += 1
                return fault
        return None

    async def answer_to(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Return the handler's answer to the request, or do what the fault of this use of its path says."""
        fault = self.take(request.path)
        if fault is None:
            return await handler(request)
        if fault.kind == "die":
            await asyncio.sleep(fault.value or 0)
            print("ordered to die", file=sys.stderr, flush=True)
            os._exit(9)
        if fault.kind == "close":
            await asyncio.sleep(0.05)
            request.transport.abort()
        if fault.kind == "wait":
            await asyncio.sleep(fault.value)
            return await handler(request)
        if fault.kind in ("hang", "close"):
            await asyncio.sleep(3600)
        if fault.kind == "status":
            return web.json_response({"error": {"message": "ordered"}}, status=fault.value)
        if fault.kind == "garbage":
            return web.Response(text="<html>")
        if fault.kind == "drip":
            return await drip(request)
        if fault.kind == "endless":
            return await endless(request)
        if fault.kind == "alike":
            return await self.alike(request, handler)
        assert fault.kind == "edit", fault
        answer = json.loads((await handler(request)).body)
        answer["meta_info"].update(fault.value)
        return web.json_response(answer)

    async def alike(self, request: web.Request, handler: Any) -> web.Response:
        """Give all requests the same answer at once: thousands of long ones cost next to nothing."""
        if self.answer is None:
            self.answer = asyncio.create_task(handler(request))
        answer = await asyncio.shield(self.answer)
        return web.Response(body=answer.body, content_type="application/json")


async def drip(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "4000"})
    await response.prepare(request)
    while True:
        await response.write(b" ")
        await asyncio.sleep(0.1)


async def endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b" " * 2**20)


def ordered_in_file(file: str | None) -> list[Fault]:
    """Return the faults that a JSON file orders, and delete the file: only the first server that starts has them."""
    if file is None or not Path(file).exists():
        return []
    faults = [Fault(**fault) for fault in json.loads(Path(file).read_text())]
    Path(file).unlink()
    return faults
