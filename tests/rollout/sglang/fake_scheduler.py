"""The fake server's scheduler: requests, pauses and the KV cache of one SGLang version, without a model."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from dapo_mcore.rollout.sglang.client.versions import (
    FIRST_WITH_CONTINUED_REQUESTS,
    FIRST_WITH_SPANS,
    FIRST_WITH_STOP_AT_LIMIT,
    SGLangVersion,
)

TICK_S = 0.02
REST_S = 0.1
"""Seconds from the end of a request until the scheduler notices it. The real one is faster, unless its machine is busy."""


@dataclass(eq=False)
class Request:
    rid: str
    tokens: list[int] = field(default_factory=list)
    spans: list[dict[str, Any]] = field(default_factory=list)
    aborted: bool = False


class Scheduler:
    """All requests of a fake server.

    cache         size of the KV cache in tokens.
    speed         tokens/s of each request.
    tail, linger  see fake_python.
    told          counts events.
    """

    def __init__(
        self,
        version: SGLangVersion,
        vocab: int,
        context: int,
        cache: int,
        speed: float,
        tail: float,
        linger: int,
        told: Counter[str],
    ):
        self.version, self.vocab, self.context = version, vocab, context
        self.capacity = min(context, cache)
        self.speed, self.tail, self.linger, self.told = speed, tail, linger, told
        self.weight_version = "default"
        self.running: set[Request] = set()
        self.unpaused = asyncio.Event()
        self.unpaused.set()
        self.paused_mode: str | None = None
        self.released: set[str] = set()
        self.busy_until = 0.0
        self.torn = False  # True while only a part of new weights has come: tokens are then 0, which tests notice

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        ids, law = body["input_ids"], {"max_new_tokens": 128, **body.get("sampling_params", {})}
        law["max_new_tokens"] = min(law["max_new_tokens"], self.capacity - len(ids) - 2)
        if error := self.refusal(ids, law):
            return web.json_response({"error": {"message": error}}, status=400)
        if max(ids) >= self.vocab:
            os._exit(1)  # as the real one: "index out of range in self"
        await self.unpaused.wait()
        work = Request(body.get("rid") or os.urandom(8).hex())
        self.running.add(work)
        self.told["generated"] += 1
        self.told["most_running"] = max(self.told["most_running"], len(self.running))
        try:
            await self.write(work, ids, *self.length(law))
        finally:
            self.running.discard(work)
            self.busy_until = time.monotonic() + REST_S
        return web.json_response(self.reply(work, ids, law))

    def refusal(self, ids: list[int], law: dict[str, Any]) -> str | None:
        if not ids:
            return "input_ids cannot be empty."
        if len(ids) > self.context:
            return f"The input ({len(ids)} tokens) is longer than the model's context length ({self.context} tokens)."
        outside = [token for token in law.get("logit_bias") or {} if not 0 <= int(token) < self.vocab]
        return f"logit_bias must has keys in [0, {self.vocab - 1}], got {outside[0]}." if outside else None

    def length(self, law: dict[str, Any]) -> tuple[int, bool]:
        """Return the length of a response, and whether its last token must wait for a weight update."""
        longest = law["max_new_tokens"]
        lingers = bool(self.linger) and law["temperature"] == 1 and law["sampling_seed"] % self.linger == 0
        if not self.tail:
            return longest, lingers
        drawn = random.Random(law["sampling_seed"]).lognormvariate(0, self.tail)
        return max(1 + lingers, min(longest, int(drawn * longest / 8))), lingers

    async def write(self, work: Request, ids: list[int], count: int, lingers: bool) -> None:
        first_version = self.weight_version
        while len(work.tokens) < count and not work.aborted:
            await asyncio.sleep(max(TICK_S, 1 / self.speed))
            if work.aborted or not self.unpaused.is_set():
                continue
            if self.released:
                os._exit(1)  # as the real one on a GPU: an illegal address
            before = len(work.tokens)
            now = count - (lingers and self.weight_version == first_version)
            after = min(now, before + max(1, int(self.speed * TICK_S)))
            if before == after:
                continue
            work.tokens += [0 if self.torn else ids[i % len(ids)] for i in range(before, after)]
            if not work.spans or work.spans[-1]["version"] != self.weight_version:
                work.spans.append({"version": self.weight_version, "start": before, "end": after})
            work.spans[-1]["end"] = after

    def reply(self, work: Request, ids: list[int], law: dict[str, Any]) -> dict[str, Any]:
        meta = {
            "id": work.rid,
            "finish_reason": self.finish_reason(work, law),
            "prompt_tokens": len(ids),
            "completion_tokens": len(work.tokens),
            "output_token_logprobs": [[-(token + 1) / self.vocab, token, None] for token in work.tokens],
            "weight_version": work.spans[-1]["version"] if work.spans else self.weight_version,
        }
        if self.version >= FIRST_WITH_SPANS:
            meta["weight_versions"] = work.spans
        return {"output_ids": work.tokens, "meta_info": meta}

    def finish_reason(self, work: Request, law: dict[str, Any]) -> dict[str, Any]:
        if work.aborted:
            return {"type": "abort", "message": "Aborted"}
        longest, last = law["max_new_tokens"], work.tokens[-1]
        stopped = last in law.get("stop_token_ids", ()) and self.version >= FIRST_WITH_STOP_AT_LIMIT
        if len(work.tokens) < longest or stopped:
            return {"type": "stop", "matched": last}
        return {"type": "length", "length": longest}

    async def abort(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.told["aborts"] += 1
        for work in self.running:
            work.aborted |= body.get("abort_all", False) or work.rid == body["rid"]
        return web.Response()

    async def pause(self, request: web.Request) -> web.Response:
        self.paused_mode = (await request.json())["mode"]
        self.unpaused.clear()
        while self.paused_mode == "abort" and self.running:
            for work in self.running:
                work.aborted = True
            await asyncio.sleep(TICK_S)
        return web.json_response({"status": "ok"})

    async def resume(self, request: web.Request) -> web.Response:
        self.unpaused.set()
        self.paused_mode = None
        return web.json_response({"status": "ok"})

    async def flush(self, request: web.Request) -> web.Response:
        done = self.flushed()
        return web.Response(text="Cache flushed.\n" if done else "Flush cache failed.\n", status=200 if done else 400)

    def flushed(self) -> bool:
        resumes = self.paused_mode == "retract" and self.version >= FIRST_WITH_CONTINUED_REQUESTS
        return resumes or (not self.running and time.monotonic() > self.busy_until)
