"""The rollout engine on SGLang servers: tokens in, tokens and log-probs out, every sample with its weights' version.

Change here: how a sample is asked for, retried, and refused. How servers are found and checked at start is assembly.py;
they are pool.py and servers.py, weights transfer.py, answers replies.py. Everything asynchronous runs in one thread; the
methods below may block their caller.
"""

from __future__ import annotations

import asyncio
import atexit
import random
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from dapo_mcore.architecture.manifest import WeightManifest, buckets
from dapo_mcore.config.sglang import SGLangConfig
from dapo_mcore.errors import RolloutError, UpdateBroken
from dapo_mcore.observe.progress import NullProgress
from dapo_mcore.rollout.sampling.limits import check_prompts
from dapo_mcore.rollout.sampling.tending import wait_tending
from dapo_mcore.rollout.sglang.assembly import new_transfer, open_fleet, start_planned
from dapo_mcore.rollout.sglang.client.answer import DROP_REASONS, Dropped
from dapo_mcore.rollout.sglang.client.api import Keys
from dapo_mcore.rollout.sglang.client.http import HttpClient, RequestFailed, allow_open_files
from dapo_mcore.rollout.sglang.client.loop_thread import LoopThread
from dapo_mcore.rollout.sglang.client.replies import VersionRule, check_length, read_reply
from dapo_mcore.rollout.sglang.client.versions import FIRST_WITH_LOST_SCALES
from dapo_mcore.rollout.sglang.launch.process import OwnedServer, stop_servers
from dapo_mcore.rollout.sglang.launch.servers import ServerPlan, read_keys
from dapo_mcore.rollout.sglang.launch.startup import Startup, shown_startup
from dapo_mcore.rollout.sglang.pool.pool import Fleet
from dapo_mcore.rollout.sglang.pool.server import Member
from dapo_mcore.rollout.sglang.sync.heads import with_heads
from dapo_mcore.rollout.sglang.sync.quantize import check_architecture, quantized, with_cache_scales
from dapo_mcore.types import Rollout, SamplingParams

_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.25, 8.0
_COUNTS = (
    "retries",
    *(f"dropped_{reason}" for reason in DROP_REASONS),
    "servers_suspected",
    "servers_excluded",
    "servers_resynced",
    "server_restarts",
)


class SGLangEngine:
    """Generates on SGLang servers, which have no weights until `update_weights` brings some.

    hf_config       the trained model; servers started here are built from it, others must serve the same.
    stop_token_ids  any of them ends a response and is its last token.
    dtype           of weights and arithmetic on servers started here.
    folder          for the servers' logs and keys.
    max_lag         0: nothing may be in flight when weights move, but what waits for them. Else requests begun by `submit`
                    go on under the new weights, and no token may be more versions than this behind the newest.
    progress        shows the servers' start.
    ray_address     of the Ray cluster that servers with placement ray start on; None: a cluster of this machine.

    Not repeatable: batches form by arrival. Raises ConfigError when a server cannot be started or used.
    `on_progress`, when set, is called with 1 for each finished sample.
    """

    def __init__(
        self,
        settings: SGLangConfig,
        hf_config: PretrainedConfig,
        *,
        stop_token_ids: Sequence[int],
        dtype: torch.dtype,
        folder: Path,
        max_lag: int = 0,
        progress: NullProgress | None = None,
        ray_address: str | None = None,
    ):
        self.on_progress: Callable[[int], None] | None = None
        self.on_starving: Callable[[], None] | None = None
        self._settings, self._stops = settings, list(stop_token_ids)
        self._vocab, self._context = hf_config.vocab_size, hf_config.max_position_embeddings
        if settings.quantize == "fp8":
            check_architecture(hf_config.architectures[0])
        self._hf_config = hf_config
        self._manifest = WeightManifest.of_config(hf_config)
        self._version, self._tag, self._max_lag = -1, "", max_lag
        self._tags: dict[str, int] = {}
        self._newest = ""  # the tag that servers are moved to; _tag once they have it
        self._counts: Counter[str] = Counter()
        self._sync_metrics: dict[str, float] = {}
        self._broken_updates = 0
        self._tell = (progress or NullProgress()).line
        allow_open_files(settings.num_servers * (settings.max_in_flight + 8))
        # halves: one travels while the next is gathered, and gathering needs room, too
        self._bucket_bytes = settings.bucket_mib << 19
        num_bytes = sum(shape.numel() for shape in self._manifest.shapes.values()) * dtype.itemsize
        self._transfer = new_transfer(settings, num_bytes, self._bucket_bytes, folder)
        self._fleet: Fleet | None = None
        self._processes: Sequence[OwnedServer] = []
        self._disconnect: Callable[[], None] = lambda: None
        self._loop = LoopThread("rollout")
        atexit.register(self.close)
        try:
            keys = read_keys(settings.key_file)
            with shown_startup(progress or NullProgress(), settings, folder) as startup:
                if not settings.urls:
                    name = str(dtype).removeprefix("torch.")
                    plan = ServerPlan.new(settings, hf_config, name, self._stops, folder, resumes=max_lag > 0)
                    self._processes, self._disconnect = start_planned(plan, ray_address)
                    keys = plan.keys
                self._fleet = self._loop.run(self._open(keys, hf_config, startup))
            if settings.colocated:
                self._loop.run(self._fleet.release())
        except BaseException:
            self.close()
            raise

    @property
    def weight_version(self) -> int:
        """The version of the last `update_weights`; -1 before the first."""
        return self._version

    def generate(self, prompts: Sequence[np.ndarray], params: SamplingParams) -> list[Rollout]:
        """One response for each entry of `prompts` (int32 [T] each), in order, all made by the current weights.

        A sample whose server fails, or whose weights are not the current ones, is dropped whole and asked for again, up
        to `max_attempts` times. Raises RolloutError then, before the first weights, and for a prompt that cannot be asked;
        and when no server has the weights any more, unless `on_starving` brings them again.
        """
        future = self._begin(prompts, params, lambda: VersionRule(self._tags, self._tag))
        try:
            wait_tending(future, self.tend)
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def submit(self, prompts: Sequence[np.ndarray], params: SamplingParams) -> Future[list[Rollout]]:
        """What `generate` does, begun and not waited for; any number may be under way. cancel() ends the requests.

        With `max_lag` they live through weight updates: a sample may then be of several versions, see version_spans.
        """
        return self._begin(prompts, params, lambda: VersionRule(self._tags, self._newest, self._max_lag))

    @property
    def starving(self) -> bool:
        """Whether no server has the weights any more, though some are well: another `update_weights` finds them."""
        return self._fleet is not None and self._fleet.starving

    def tend(self) -> None:
        """Calls `on_starving` while servers starve. Who waits for `submit` calls it now and then."""
        if self.on_starving is not None and self.starving:
            self.on_starving()

    def empty(self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory for a tensor of the next `update_weights`: with sync tensor, large ones are gathered into shared memory."""
        return self._transfer.empty(shape, dtype=dtype, device=device)

    def update_weights(self, weights: Iterator[tuple[str, torch.Tensor]], version: int) -> None:
        """Takes every HF-named tensor of the stream, then moves to `version`, once every server that serves has it.

        A server that fails is taken out and must take the same weights before it serves again. Raises RolloutError for
        a stream that does not fit the model, and when no server is left; the version then stays. UpdateBroken says that
        another try finds servers.
        Extra memory: at most twice bucket_mib, or twice the largest tensor, where a layer's matrices are small beside
        these (with `quantize`, what that needs beside). With sync tensor, for a stream that takes large tensors from
        `empty`; others are copied.
        """
        weights = iter(weights)
        # Not the bare version: two syncs of one version may differ (warm start), and servers may outlive a run.
        tag = f"{version}-{secrets.token_hex(4)}"
        self._tags[tag], self._newest = version, tag
        stream = self._served(self._manifest.checked(weights, version))
        try:
            sent = self._transfer.send(buckets(stream, self._bucket_bytes), tag, self._fleet, self._loop)
        except BaseException as error:
            self._newest = self._tag
            self._broken_updates += isinstance(error, UpdateBroken)
            raise
        finally:
            deque(weights, maxlen=0)  # the senders' collectives must complete
        self._version, self._tag = version, tag
        seconds = sum(value for name, value in sent.items() if name.endswith("_s"))
        repeats, self._broken_updates = float(self._broken_updates), 0
        self._sync_metrics |= {**sent, "sync/gb_per_s": sent["sync/bytes"] / 1e9 / seconds, "sync/repeats": repeats}
        if self._fleet.checksums is not None:
            self._sync_metrics["sync/servers_verified"] = float(self._fleet.checksums.num_verified)

    def release(self) -> None:
        """Servers give up all device memory, weights included; one that cannot is stopped. See types.ColocatedEngine."""
        start = time.perf_counter()
        self._loop.run(self._fleet.release())
        self._sync_metrics["sync/release_s"] = time.perf_counter() - start

    def resume(self) -> None:
        """Servers with the weights of the last `update_weights` take the rest of their memory and generate.

        Raises RolloutError when none does.
        """
        start = time.perf_counter()
        self._loop.run(self._fleet.resume())
        self._sync_metrics["sync/resume_s"] = time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """`rollout/…` counts and `sync/…` times since the last call, and how many servers serve."""
        counts = self._loop.run(self._pop_counts())
        rows = {f"rollout/{name}": float(counts[name]) for name in _COUNTS}
        sync, self._sync_metrics = self._sync_metrics, {}
        return {"rollout/servers_serving": float(len(self._fleet.serving)), **rows, **sync}

    def close(self) -> None:
        """Ends the servers started here and deletes the weights on disk. May be called twice."""
        if self._fleet is not None:
            self._loop.run(self._fleet.close())
            self._loop.cancel_all()  # requests in flight are aborted on their servers
            self._loop.run(self._http.close())
            self._fleet = None
        stop_servers(self._processes)
        self._disconnect()
        self._loop.close()
        self._transfer.close()
        atexit.unregister(self.close)  # not before: this may have been broken off

    def _served(self, weights: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The stream as the servers hold it."""
        architecture = self._hf_config.architectures[0]
        stream = with_heads(weights, architecture, self._manifest.tied)
        if self._settings.quantize == "none":
            return stream
        stream = quantized(stream)
        loses_scales = any(member.version < FIRST_WITH_LOST_SCALES for member in self._fleet.members)
        if self._settings.colocated and loses_scales:
            return with_cache_scales(stream, architecture, self._hf_config.num_hidden_layers)
        return stream

    async def _open(self, keys: Keys, hf_config: PretrainedConfig, startup: Startup) -> Fleet:
        self._http = HttpClient(self._settings.connect_timeout_s, self._settings.read_timeout_s)
        try:
            return await open_fleet(
                self._settings,
                self._http,
                keys,
                self._processes,
                hf_config,
                startup,
                resync=self._transfer.resync,
                resumes=self._max_lag > 0,
                may_starve=lambda: self.on_starving is not None,
                tell=self._tell,
            )
        except BaseException:
            await self._http.close()
            raise

    async def _pop_counts(self) -> Counter[str]:
        """In the loop, where they are counted."""
        counts = self._counts + self._fleet.counts
        self._counts.clear()
        self._fleet.counts.clear()
        return counts

    def _begin(
        self, prompts: Sequence[np.ndarray], params: SamplingParams, rule: Callable[[], VersionRule]
    ) -> Future[list[Rollout]]:
        """Requests whose answers must keep the rule of the time when they arrive."""
        if self._version < 0:
            raise RolloutError("the rollout servers have no weights yet; call update_weights before generate")
        check_prompts(prompts, params.max_new_tokens, self._vocab, self._context)
        return self._loop.submit(self._generate(prompts, params, rule))

    async def _generate(
        self, prompts: Sequence[np.ndarray], params: SamplingParams, rule: Callable[[], VersionRule]
    ) -> list[Rollout]:
        seeds = np.random.SeedSequence(params.seed).generate_state(len(prompts), np.uint64) >> np.uint64(1)
        law = {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "max_new_tokens": params.max_new_tokens,
            "stop_token_ids": self._stops,
        }
        samples = [
            asyncio.create_task(self._sample(prompt.tolist(), {**law, "sampling_seed": int(seed)}, rule))
            for prompt, seed in zip(prompts, seeds)
        ]
        try:
            return await asyncio.gather(*samples)
        except BaseException:
            for sample in samples:
                sample.cancel()
            await asyncio.gather(*samples, return_exceptions=True)
            raise

    async def _sample(self, token_ids: list[int], law: dict[str, Any], rule: Callable[[], VersionRule]) -> Rollout:
        """One sample, from whichever server makes it; each try starts from the prompt."""
        body = {"input_ids": token_ids, "sampling_params": law, "return_logprob": True}
        failed: Member | None = None
        problem = ""
        for attempt in range(self._settings.max_attempts):
            if attempt:
                self._counts["retries"] += 1
                longest = min(_FIRST_BACKOFF_S * 2**attempt, _LONGEST_BACKOFF_S)
                await asyncio.sleep(random.uniform(0, longest))  # full jitter: a dead server's requests come back apart
            member = await self._fleet.acquire(avoid=failed)
            try:
                rollout = await self._ask(member, body, rule)
            except (RequestFailed, Dropped) as error:
                failed, problem = member, f"{member.api.url}: {error}"
                continue
            if self.on_progress:
                self.on_progress(1)
            return rollout
        raise RolloutError(
            f"a sample failed {self._settings.max_attempts} times (rollout.sglang.max_attempts); at last {problem}"
        )

    async def _ask(self, member: Member, body: dict[str, Any], rule: Callable[[], VersionRule]) -> Rollout:
        rid = secrets.token_hex(8)
        request = member.api.generate({**body, "rid": rid}, self._settings.request_timeout_s)
        try:
            reply = await self._fleet.call(member, request)
            rollout = read_reply(reply, rule(), self._stops)
        except RequestFailed as error:
            self._fleet.suspect(member, str(error))
            await self._fleet.abort(member, rid)
            raise
        except asyncio.CancelledError:
            await self._fleet.abort(member, rid)
            raise
        except Dropped as error:
            self._counts[f"dropped_{error.reason}"] += 1
            if error.reason != "aborted":
                self._fleet.suspect(member, str(error), reload=error.reason != "malformed")
            raise
        member.strikes = 0
        check_length(rollout, len(body["input_ids"]), body["sampling_params"]["max_new_tokens"], self._context)
        return rollout
