"""The start of an engine: its sender, its servers, and the pool that they become. Each server is checked and shown.

Change here: what a server must show before a run uses it, with the sentence that a user reads if it fails; and what is shown
while servers start, which takes from half a minute to several. How it looks on a terminal is in observe/progress.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from dapo_mcore.config.sglang import SGLangConfig
from dapo_mcore.errors import ConfigError, RolloutError
from dapo_mcore.observe.progress import NullProgress, format_seconds
from dapo_mcore.rollout.sglang.client.api import Keys, ServerClient, ServerFacts
from dapo_mcore.rollout.sglang.client.http import HttpClient, RequestFailed, RequestRefused
from dapo_mcore.rollout.sglang.client.versions import check_version
from dapo_mcore.rollout.sglang.launch.node_servers import Node, start_node_servers
from dapo_mcore.rollout.sglang.launch.process import LaunchedServer
from dapo_mcore.rollout.sglang.launch.ray_servers import start_ray_servers
from dapo_mcore.rollout.sglang.launch.servers import ServerPlan, start_servers
from dapo_mcore.rollout.sglang.pool.pool import ServerPool
from dapo_mcore.rollout.sglang.pool.recovery import Reload
from dapo_mcore.rollout.sglang.pool.server import PoolSettings, Server, wait_until_healthy
from dapo_mcore.rollout.sglang.pool.update import Checksums
from dapo_mcore.rollout.sglang.sync.delta import DeltaSender
from dapo_mcore.rollout.sglang.sync.disk import DiskSender, check_sync_dir
from dapo_mcore.rollout.sglang.sync.distributed import DistributedSender, check_sync_host
from dapo_mcore.rollout.sglang.sync.relay import Relays
from dapo_mcore.rollout.sglang.sync.sender import Sender
from dapo_mcore.rollout.sglang.sync.tensor import TensorSender

_SHOW_S = 30.0


def new_sender(
    settings: SGLangConfig, num_bytes: int, bucket_bytes: int, run_folder: Path, relays: Relays | None = None
) -> Sender[Any]:
    """Return the sender of `settings`, for a model of `num_bytes`. `run_folder` gives its files a name of their own."""
    sender = _plain_sender(settings, num_bytes, bucket_bytes, run_folder, relays)
    return DeltaSender(sender, bucket_bytes) if settings.delta else sender


def _plain_sender(
    settings: SGLangConfig, num_bytes: int, bucket_bytes: int, run_folder: Path, relays: Relays | None
) -> Sender[Any]:
    if settings.sync == "distributed":
        backend = "gloo" if settings.device == "cpu" else "nccl"
        return DistributedSender(settings.sync_host, backend, settings.sync_timeout_s, settings.servers_per_group)
    if settings.sync == "tensor":
        return TensorSender(settings.urls, bucket_bytes, relays)
    return DiskSender(weights_folder(settings, run_folder), num_bytes)


def weights_folder(settings: SGLangConfig, run_folder: Path) -> Path:
    """Return the folder in which this run, and no other one, writes weights for sync disk."""
    run = hashlib.sha256(str(run_folder.absolute()).encode()).hexdigest()[:12]
    return Path(settings.sync_dir) / f"dapo_mcore-{run}"


def start_planned(
    plan: ServerPlan, ray_address: str | None, nodes: Sequence[Node]
) -> tuple[Sequence[LaunchedServer], Callable[[], None]]:
    """Start the plan's servers. Return them, and a function that ends the connection to a Ray cluster.

    ray_address  of the cluster for placement ray; None for a cluster of this machine alone.
    nodes        of the training job, for placement nodes.
    """
    if plan.settings.placement == "nodes":
        return start_node_servers(plan, nodes), lambda: None
    if plan.settings.placement == "ray":
        return start_ray_servers(plan, ray_address)
    return start_servers(plan), lambda: None


async def open_pool(
    settings: SGLangConfig,
    http: HttpClient,
    keys: Keys,
    processes: Sequence[LaunchedServer],
    hf_config: PretrainedConfig,
    startup: Startup,
    *,
    reload: Reload | None,
    continues_requests: bool,
    tell: Callable[[str], None],
) -> ServerPool:
    """Return a pool of the servers in `processes` or at settings.urls, once each of them is up and checked.

    startup             is told of servers that are up.
    continues_requests  requests in flight must continue after a weight update.
    reload, tell        see ServerPool.
    Raise ConfigError for a server that cannot be used.
    """
    s = settings
    places = [(process.url, process) for process in processes] or [(url, None) for url in s.urls]
    servers = [Server(ServerClient(http, url, keys, s.sync_timeout_s), process=process) for url, process in places]
    router = Server(ServerClient(http, s.router_url, keys, s.sync_timeout_s)) if s.router_url else None
    if s.sync == "distributed":
        check_sync_host(s.sync_host, [url for url, _ in places])
    if s.sync == "disk":
        check_sync_dir(Path(s.sync_dir), [url for url, _ in places])
    await asyncio.gather(*(_admit(server, s, hf_config, continues_requests, startup) for server in servers))
    if router is not None:
        await probe_router(router.client, s.urls)
    pool_settings = PoolSettings(
        max_in_flight=s.max_in_flight * (len(servers) if router else 1),
        health_interval_s=s.health_interval_s,
        health_timeout_s=s.health_timeout_s,
        start_timeout_s=s.start_timeout_s,
        step_timeout_s=s.sync_timeout_s,
        weights_timeout_s=s.request_timeout_s,
        restart_budget=s.restart_budget,
        continues_requests=continues_requests,
    )
    checksums = Checksums() if s.verify_sync == "servers" else None
    return ServerPool(servers, pool_settings, router=router, reload=reload, checksums=checksums, tell=tell)


async def probe(client: ServerClient, hf_config: PretrainedConfig, continues_requests: bool = False) -> ServerFacts:
    """Return what the server reports about itself: it is reachable, takes our keys, is new enough and has our model.

    Raise ConfigError with the remedy if the run cannot use it.
    """
    try:
        facts = await client.facts()
        check_version(facts.sglang_version, client.url, continues_requests)
        await client.flush_cache()
        vocab_size = await client.vocab_size()
    except RequestFailed as error:
        raise ConfigError(f"no SGLang server answers: {error}; start it, or correct rollout.sglang.urls") from error
    except RequestRefused as refusal:
        if refusal.status not in (401, 403):
            raise ConfigError(
                f"{client.url} does not answer like an SGLang server: HTTP {refusal.status} from {refusal.url}; correct "
                "rollout.sglang.urls"
            ) from refusal
        raise ConfigError(
            f"{refusal}; give the server's api_key and admin_key in rollout.sglang.key_file (SGLang's admin calls take the "
            "admin key alone, where there is one)"
        ) from refusal
    _check_model(client.url, facts, vocab_size, hf_config)
    return facts


async def probe_router(client: ServerClient, urls: Sequence[str]) -> None:
    """Raise ConfigError unless a router answers that sends requests to the servers `urls` and no others.

    A server that only the router knows never gets weights, so everything that it generates would be dropped.
    """
    try:
        workers = await client.workers()
    except RequestFailed as error:
        raise ConfigError(f"no router answers: {error}; start it, or correct rollout.sglang.router_url") from error
    if workers is None:
        return
    listed = {url.rstrip("/") for url in urls}
    unlisted, unknown = sorted(set(workers) - listed), sorted(listed - set(workers))
    if unlisted or unknown:
        raise ConfigError(
            f"the router {client.url} sends requests to {len(unlisted)} servers that rollout.sglang.urls does not list "
            f"({', '.join(unlisted) or 'none'}), and not to {len(unknown)} that it does ({', '.join(unknown) or 'none'}); "
            "list the same servers on both, by the same URLs"
        )


class Startup:
    """Shows the start of `num_servers` servers."""

    def __init__(self, progress: NullProgress, num_servers: int, hint: str, clock: Callable[[], float]):
        self._progress, self._num_servers, self._hint, self._clock = progress, num_servers, hint, clock
        self._start, self._num_up, self._num_shown = clock(), 0, 0

    @property
    def elapsed(self) -> str:
        return format_seconds(self._clock() - self._start)

    def is_up(self) -> None:
        """Count one more server that can be used. May be called from any thread."""
        self._num_up += 1
        self._progress.advance()

    async def waiting(self, server: LaunchedServer) -> None:
        """Show every half minute how long the start takes and what `server` wrote last. Call it often while you wait for it."""
        if self._clock() - self._start < _SHOW_S * (self._num_shown + 1):
            return
        self._num_shown += 1
        line = await asyncio.to_thread(server.last_line)
        wrote = f"{server.url} last wrote: {line}" if line else f"{server.url} has written nothing yet"
        self._progress.line(
            f"{self._num_up} of {self._num_servers} servers up after {self.elapsed}{self._hint}; {wrote}"
        )


@contextmanager
def shown_startup(
    progress: NullProgress, settings: SGLangConfig, folder: Path, clock: Callable[[], float] = time.monotonic
) -> Iterator[Startup]:
    """Show the start of the servers while the block runs.

    A bar on a terminal counts the servers that are up and the seconds. One line says that they start, one every half minute
    how it goes, and one that all are up. Servers at `urls` are not started here, so they have only the bar.
    """
    count = settings.num_servers
    hint = " (a first start on a machine compiles kernels, about two minutes)" if settings.device == "cuda" else ""
    startup = Startup(progress, count, hint, clock)
    servers = "1 SGLang server" if count == 1 else f"{count} SGLang servers"
    if not settings.urls:
        place = {"local": "logs", "nodes": "on the job's nodes, logs", "ray": "by Ray, logs on their nodes"}[
            settings.placement
        ]
        progress.line(f"starting {servers} ({place} in {folder})")
    progress.phase("servers", total=count)
    try:
        yield startup
    finally:
        progress.clear()
    if not settings.urls:
        progress.line(f"{count} of {servers} up after {startup.elapsed}")


async def _admit(
    server: Server, settings: SGLangConfig, hf_config: PretrainedConfig, continues_requests: bool, startup: Startup
) -> None:
    if server.process is not None:
        try:
            await wait_until_healthy(server, settings.start_timeout_s, startup.waiting)
        except RolloutError as error:
            raise ConfigError(f"rollout.sglang: {error}") from error
    facts = await probe(server.client, hf_config, continues_requests)
    server.num_ranks, server.sglang_version = facts.num_ranks, facts.sglang_version
    if settings.verify_sync == "servers" and await server.client.weights_checker() is None:
        raise ConfigError(
            f"{server.url} tells no checksums of its weights, which rollout.sglang.verify_sync servers compares; "
            "SGLang tells them on GPUs, and from 0.5.23 on without: set verify_sync off"
        )
    startup.is_up()


def _check_model(url: str, facts: ServerFacts, vocab_size: int | None, hf_config: PretrainedConfig) -> None:
    """Raise ConfigError if the server has another model: a tensor of another shape would end it at the first update.

    Compare what the server shows: its vocabulary size, and more if this machine sees its model folder.
    """
    served = {"vocab_size": vocab_size} | _sizes(Path(facts.model_path))
    for key, value in served.items():
        ours = getattr(hf_config, key, None)
        if None not in (value, ours) and value != ours:
            raise ConfigError(
                f"{url} serves a model with {key} {value} ({facts.model_path}), but model.path has {ours}; start the "
                "server with the model that is trained"
            )


def _sizes(folder: Path) -> dict[str, int]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
    return {key: config[key] for key in keys if key in config}
