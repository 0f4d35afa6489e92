"""The rollout engine on SGLang servers: tokens in, tokens and log-probs out, each sample with the version of its weights.

Change here: what the engine offers, and how a weight stream is sent; a sample's request is in requests.py. Everything asynchronous
runs in one thread. The public methods below may block their caller.
"""

from __future__ import annotations

import atexit
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from dapo_mcore.architecture.families import architecture_name
from dapo_mcore.architecture.manifest import StreamCheck, WeightManifest, buckets
from dapo_mcore.config.sglang import SGLangConfig
from dapo_mcore.data.stops import StopTexts
from dapo_mcore.errors import RolloutError, UpdateBroken
from dapo_mcore.observe.progress import NullProgress
from dapo_mcore.process.loop_thread import LoopThread
from dapo_mcore.rollout.sampling.limits import check_prompts
from dapo_mcore.rollout.sglang.assembly import Startup, new_sender, open_pool, shown_startup, start_planned
from dapo_mcore.rollout.sglang.client.api import Keys
from dapo_mcore.rollout.sglang.client.http import HttpClient, allow_open_files
from dapo_mcore.rollout.sglang.client.reply import DROP_REASONS, VersionRule
from dapo_mcore.rollout.sglang.client.versions import FIRST_WITH_LOST_SCALES
from dapo_mcore.rollout.sglang.launch.node_servers import Node
from dapo_mcore.rollout.sglang.launch.process import LaunchedServer, stop_servers
from dapo_mcore.rollout.sglang.launch.servers import ServerPlan, read_keys
from dapo_mcore.rollout.sglang.pool.pool import ServerPool
from dapo_mcore.rollout.sglang.requests import Requests
from dapo_mcore.rollout.sglang.sync.delta import check_delta
from dapo_mcore.rollout.sglang.sync.parts import OtherLeaders
from dapo_mcore.rollout.sglang.sync.process_group import in_daemon
from dapo_mcore.rollout.sglang.sync.relay import Relays
from dapo_mcore.rollout.sglang.sync.sender import Buckets, Sender, send_stream
from dapo_mcore.rollout.sglang.sync.weight_format import as_served, check_architecture, with_cache_scales
from dapo_mcore.types import Rollout, SamplingParams

_COUNTS = (
    "retries",
    *(f"dropped_{reason}" for reason in DROP_REASONS),
    "servers_suspected",
    "servers_excluded",
    "servers_resynced",
    "server_restarts",
)


class SGLangEngine:
    """Generates on SGLang servers, which have no weights until the first `update_weights`.

    hf_config       the trained model. Servers that are started here are built from it; others must serve the same.
    stop_token_ids  any of them ends a response and is its last token.
    stop_texts      any of them ends a response, with the token that completes it. Servers that are started here get its tokenizer.
    dtype           of weights and arithmetic on servers that are started here.
    folder          for the servers' logs and keys.
    max_lag         0: a weight update aborts the requests in flight, and they are sent again. Else requests of `submit`
                    continue under the new weights, and no token may be more versions than this behind the newest.
    progress        shows the servers' start.
    ray_address     of the Ray cluster for servers with placement ray; None for a cluster of this machine alone.
    nodes           of the training job, for servers with placement nodes.
    relays          of sync tensor to servers on these nodes.

    Not repeatable: servers batch requests as they arrive. Raise ConfigError if a server cannot be started or used.
    `on_progress`, if set, is called with 1 for each finished sample. `pool` holds the servers until `close`, `sender` is the
    way of a weight sync, and `bucket_bytes` limits one bucket of it.
    """

    def __init__(
        self,
        settings: SGLangConfig,
        hf_config: PretrainedConfig,
        *,
        stop_token_ids: Sequence[int],
        stop_texts: StopTexts | None = None,
        dtype: torch.dtype,
        folder: Path,
        max_lag: int = 0,
        progress: NullProgress | None = None,
        ray_address: str | None = None,
        nodes: Sequence[Node] = (),
        relays: Relays | None = None,
    ):
        self.on_progress: Callable[[int], None] | None = None
        self._settings, self._stops = settings, list(stop_token_ids)
        self._vocab, self._context = hf_config.vocab_size, hf_config.max_position_embeddings
        if settings.quantize == "fp8":
            check_architecture(architecture_name(hf_config))
        self._hf_config = hf_config
        self._manifest = WeightManifest.of_config(hf_config)
        # The servers know weights by a name, their weight_version. It holds our version and a random part: two syncs of one
        # version may differ (warm start), and servers may outlive a run.
        self._version, self._served_version, self._max_lag = -1, "", max_lag
        self._versions: dict[str, int] = {}
        self._newest_version = ""  # the one that servers are moved to; _served_version once they have it
        self._sync_metrics: dict[str, float] = {}
        self._num_broken_updates = 0
        self._relays = relays
        self._others: OtherLeaders | None = None
        self._tell = (progress or NullProgress()).line
        allow_open_files(settings.num_servers * settings.connections_per_server)
        # half of it: one bucket travels while the next is gathered, and gathering needs room, too
        self.bucket_bytes = settings.bucket_mib << 19
        num_bytes = sum(shape.numel() for shape in self._manifest.shapes.values()) * dtype.itemsize
        if settings.delta:
            check_delta(architecture_name(hf_config), num_bytes)
        self.sender: Sender[Any] = new_sender(settings, num_bytes, self.bucket_bytes, folder, relays)
        self.pool: ServerPool | None = None
        self._processes: Sequence[LaunchedServer] = []
        self._disconnect: Callable[[], None] = lambda: None
        self._loop = LoopThread("rollout")
        atexit.register(self.close)
        try:
            keys = read_keys(settings.key_file)
            with shown_startup(progress or NullProgress(), settings, folder) as startup:
                if not settings.urls:
                    name, tokenizer = str(dtype).removeprefix("torch."), stop_texts.tokenizer if stop_texts else ""
                    plan = ServerPlan.new(settings, hf_config, name, self._stops, folder, max_lag > 0, tokenizer)
                    self._processes, self._disconnect = start_planned(plan, ray_address, nodes)
                    keys = plan.keys
                self.pool = self._loop.run(self._open(keys, startup))
            self._requests = Requests(self.pool, settings, self._stops, stop_texts, self._context, self._count_sample)
            if settings.colocated:
                self._loop.run(self.pool.release())
        except BaseException:
            self.close()
            raise

    @property
    def weight_version(self) -> int:
        """The version of the last `update_weights`; -1 before the first."""
        return self._version

    @property
    def weights_lost(self) -> bool:
        """True if no server has the weights any more, but some are healthy: another `update_weights` makes them serve."""
        return self.pool is not None and self.pool.weights_lost

    def generate(self, prompts: Sequence[np.ndarray], params: SamplingParams) -> list[Rollout]:
        """Return one response for each entry of `prompts` (int32 [T] each), in order, all made by the current weights.

        A sample is dropped whole and sent again if its server fails or its weights are not the current ones, up to
        `max_attempts` times. Raise RolloutError then, before the first weights, for a prompt that no server takes, and if no
        server has the weights any more and no update brings them in time.
        """
        work = self._checked(prompts, params, lambda: VersionRule(self._versions, self._served_version))
        return self._loop.run(work)

    def submit(self, prompts: Sequence[np.ndarray], params: SamplingParams) -> Future[list[Rollout]]:
        """Start what `generate` does and return its future. Any number may be under way. cancel() aborts the requests.

        With `max_lag` they continue after weight updates: a sample may then be of several versions, see version_spans.
        """
        work = self._checked(prompts, params, lambda: VersionRule(self._versions, self._newest_version, self._max_lag))
        return self._loop.submit(work)

    def cancel_requests(self) -> None:
        """Cancel all requests and take no new ones: whoever waits for one gets CancelledError."""
        self._loop.run(self._requests.cancel())

    def empty(self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return memory for a tensor of the next `update_weights`. With sync tensor, large ones are in shared memory."""
        return self.sender.empty(shape, dtype=dtype, device=device)

    def lead(self, others: OtherLeaders) -> None:
        """Let other ranks send their parts of each stream from the next `update_weights` on: it gets the rest. For sync
        distributed."""
        self._others = self.sender.others = others

    def update_weights(self, weights: Iterator[tuple[str, torch.Tensor]], version: int) -> None:
        """Take every HF-named tensor of the stream, and move to `version` once every serving server has confirmed it.

        A server that fails is taken out, and must take the same weights before it serves again. Raise RolloutError if the
        stream does not fit the model, or no server is left; the version then stays. Raise UpdateBroken if another try may
        find servers. The stream is drained in any case.
        Extra memory on this rank: at most twice bucket_mib, or twice the largest tensor, if a layer's matrices are small
        compared to these (with `quantize`, plus what that needs). With sync tensor this holds for a stream whose large
        tensors come from `empty`; others are copied.
        """
        weights = iter(weights)
        weight_version = f"{version}-{secrets.token_hex(4)}"
        self._versions[weight_version], self._newest_version = version, weight_version
        check = StreamCheck(self._manifest, version)
        checked = check.whole(weights)
        if self._others is not None:
            self._others.begin()
            checked = check.passing(weights)
        stream = self._as_served(checked)
        try:
            update = partial(self._update_servers, weight_version, check)
            sent = send_stream(buckets(stream, self.bucket_bytes), self.sender, weight_version, self._loop, update)
        except BaseException as error:
            self._newest_version = self._served_version
            self._num_broken_updates += isinstance(error, UpdateBroken)
            raise
        finally:
            self._dismiss_leaders()  # they send shards too
            deque(weights, maxlen=0)  # other ranks send what is in it
        self._version, self._served_version = version, weight_version
        others_bytes = self._others.num_bytes if self._others is not None else 0
        self._sync_metrics |= {**sent.metrics(others_bytes), "sync/repeats": float(self._num_broken_updates)}
        self._num_broken_updates = 0
        if self.pool.checksums is not None:
            self._sync_metrics["sync/servers_verified"] = float(self.pool.checksums.num_verified)

    def dismiss_peers(self) -> None:
        """End the update at the relays and other leaders, if there are any. See types.LeadingEngine."""
        if self._relays is not None:
            self._relays.dismiss()
        self._dismiss_leaders()

    def _dismiss_leaders(self) -> None:
        if self._others is not None:
            self._others.dismiss()

    def release(self) -> None:
        """Make the servers release all device memory, weights included. See types.ColocatedEngine."""
        start = time.perf_counter()
        self._loop.run(self.pool.release())
        self._sync_metrics["sync/release_s"] = time.perf_counter() - start

    def resume(self) -> None:
        """Let the servers with the weights of the last `update_weights` take the rest of their memory and generate.

        Raise RolloutError if none does.
        """
        start = time.perf_counter()
        self._loop.run(self.pool.resume())
        self._sync_metrics["sync/resume_s"] = time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """Return `rollout/…` counts and `sync/…` times since the last call, and how many servers serve."""
        counts = self._loop.run(self._pop_counts())
        rows = {f"rollout/{name}": float(counts[name]) for name in _COUNTS}
        sync, self._sync_metrics = self._sync_metrics, {}
        return {"rollout/servers_serving": float(len(self.pool.serving)), **rows, **sync}

    def close(self) -> None:
        """Stop the servers that were started here, and delete the weights on disk. May be called twice."""
        if self.pool is not None:
            self._loop.run(self.pool.close())
            self._loop.cancel_all()  # requests in flight are aborted on their servers
            self._loop.run(self._http.close())
            self.pool = None
        stop_servers(self._processes)
        self._disconnect()
        self._loop.close()
        self.sender.close()
        atexit.unregister(self.close)  # not before: this call may have been interrupted

    def _as_served(self, weights: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Return the stream in the form that the servers load."""
        stream = as_served(weights, self._hf_config, self._manifest.tied, self._settings.quantize)
        loses_scales = any(server.sglang_version < FIRST_WITH_LOST_SCALES for server in self.pool.servers)
        if self._settings.quantize == "fp8" and self._settings.colocated and loses_scales:
            config = self._hf_config
            return with_cache_scales(stream, architecture_name(config), config.num_hidden_layers)
        return stream

    async def _update_servers(self, weight_version: str, check: StreamCheck, own: Buckets[Any]) -> None:
        """Open an update and let the sender give this rank's buckets, and those of other leaders, to the servers in it."""
        others = self._others
        outgoing = own if others is None else others.join(own, check, weight_version)
        try:
            async with self.pool.update(weight_version, self._num_broken_updates) as update, aclosing(outgoing):
                await self.sender.send(update, outgoing)
        finally:
            await in_daemon(
                self._dismiss_leaders
            )  # this rank's stream may wait for shards of a leader that has stopped

    async def _open(self, keys: Keys, startup: Startup) -> ServerPool:
        self._http = HttpClient(self._settings.connect_timeout_s, self._settings.read_timeout_s)
        try:
            return await open_pool(
                self._settings,
                self._http,
                keys,
                self._processes,
                self._hf_config,
                startup,
                reload=self.sender.reload,
                continues_requests=self._max_lag > 0,
                tell=self._tell,
            )
        except BaseException:
            await self._http.close()
            raise

    def _count_sample(self) -> None:
        if self.on_progress:
            self.on_progress(1)

    async def _pop_counts(self) -> Counter[str]:
        """Return and reset the counts. Runs in the loop, since they are counted there."""
        counts = self._requests.counts + self.pool.counts
        self._requests.counts.clear()
        self.pool.counts.clear()
        return counts

    def _checked(
        self, prompts: Sequence[np.ndarray], params: SamplingParams, rule: Callable[[], VersionRule]
    ) -> Coroutine[Any, Any, list[Rollout]]:
        """Return the work of requests that can be made. An answer must keep the rule that `rule` returns when it arrives."""
        if self._version < 0:
            raise RolloutError("the rollout servers have no weights yet; call update_weights before generate")
        check_prompts(prompts, params.max_new_tokens, self._vocab, self._context)
        return self._requests.generate(prompts, params, rule)
