"""Requests of samples to the servers: asked for, sent again, and refused.

Change here: how a sample is asked for, retried and dropped. Everything runs in the engine's event loop.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dapo_mcore.config.sglang import SGLangConfig
from dapo_mcore.data.stops import StopTexts
from dapo_mcore.errors import RolloutError
from dapo_mcore.process.loop_thread import gather_all
from dapo_mcore.rollout.sglang.client.api import sampling_params
from dapo_mcore.rollout.sglang.client.http import RequestFailed
from dapo_mcore.rollout.sglang.client.reply import Dropped, VersionRule, check_length, cut_at_text, read_reply
from dapo_mcore.rollout.sglang.pool.pool import ServerPool
from dapo_mcore.rollout.sglang.pool.server import Server
from dapo_mcore.types import Rollout, SamplingParams

_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.25, 8.0


class Requests:
    """The samples that are under way on the servers of a pool.

    stops, texts  end a response: token ids, and texts or None.
    context       tokens that a sequence may have.
    on_sample     called for each finished sample.
    counts        of retries and of dropped samples, by reason.
    """

    def __init__(
        self,
        pool: ServerPool,
        settings: SGLangConfig,
        stops: list[int],
        texts: StopTexts | None,
        context: int,
        on_sample: Callable[[], None],
    ):
        self.counts: Counter[str] = Counter()
        self._pool, self._settings, self._on_sample = pool, settings, on_sample
        self._stops, self._texts, self._context = stops, texts, context
        self._tasks: set[asyncio.Task[Any]] = set()
        self._takes_more = True

    async def cancel(self) -> None:
        """Cancel all requests and take no new ones."""
        self._takes_more = False
        for task in self._tasks:
            task.cancel()

    async def generate(
        self, prompts: Sequence[np.ndarray], params: SamplingParams, rule: Callable[[], VersionRule]
    ) -> list[Rollout]:
        """Return one response for each prompt, in order. An answer must keep the rule that `rule` returns when it arrives.

        Raise RolloutError if a sample fails `max_attempts` times, and CancelledError after `cancel`.
        """
        if not self._takes_more:
            raise asyncio.CancelledError
        task = asyncio.current_task()
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        seeds = np.random.SeedSequence(params.seed).generate_state(len(prompts), np.uint64) >> np.uint64(1)
        law = sampling_params(params, self._stops, self._texts.texts if self._texts else ())
        return await gather_all(
            self._sample(prompt.tolist(), {**law, "sampling_seed": int(seed)}, rule)
            for prompt, seed in zip(prompts, seeds)
        )

    async def _sample(self, token_ids: list[int], law: dict[str, Any], rule: Callable[[], VersionRule]) -> Rollout:
        """Return one sample from whichever server makes it. Each try starts from the prompt."""
        body = {"input_ids": token_ids, "sampling_params": law, "return_logprob": True}
        failed, problem = None, ""
        for attempt in range(self._settings.max_attempts):
            if attempt:
                self.counts["retries"] += 1
                longest = min(_FIRST_BACKOFF_S * 2**attempt, _LONGEST_BACKOFF_S)
                await asyncio.sleep(random.uniform(0, longest))  # full jitter spreads a dead server's requests
            server = await self._pool.acquire(avoid=failed)
            try:
                rollout = await self._ask(server, body, rule)
            except (RequestFailed, Dropped) as error:
                failed, problem = server, f"{server.url}: {error}"
                continue
            self._on_sample()
            return replace(rollout, seed=law["sampling_seed"])
        raise RolloutError(
            f"a sample failed {self._settings.max_attempts} times (rollout.sglang.max_attempts); at last {problem}"
        )

    async def _ask(self, server: Server, body: dict[str, Any], rule: Callable[[], VersionRule]) -> Rollout:
        """Return the sample of one request. Raise RequestFailed or Dropped; the server is then suspected."""
        rid = secrets.token_hex(8)
        request = server.client.generate({**body, "rid": rid}, self._settings.request_timeout_s)
        try:
            reply = await self._pool.call(server, request)
            rollout = cut_at_text(read_reply(reply, rule(), self._stops), self._texts)
        except RequestFailed as error:
            self._pool.suspect(server, str(error))
            await self._pool.abort_request(server, rid)
            raise
        except asyncio.CancelledError:
            await self._pool.abort_request(server, rid)
            raise
        except Dropped as error:
            self.counts[f"dropped_{error.reason}"] += 1
            if error.reason != "aborted":
                self._pool.suspect(server, str(error), reload=error.reason != "malformed")
            raise
        server.num_failures = 0
        check_length(rollout, len(body["input_ids"]), body["sampling_params"]["max_new_tokens"], self._context)
        return rollout
