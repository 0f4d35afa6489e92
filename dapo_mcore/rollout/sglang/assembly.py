"""The parts of an engine, from its settings: the way weights travel, the servers, and the fleet that they become.

Change here: what a server must show before a run uses it. What becomes of it later is pool.py.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PretrainedConfig

from dapo_mcore.config.sglang import SGLangConfig
from dapo_mcore.errors import ConfigError, RolloutError
from dapo_mcore.rollout.sglang.client.api import Keys, ServerApi
from dapo_mcore.rollout.sglang.client.http import HttpClient
from dapo_mcore.rollout.sglang.launch.probe import probe, probe_router
from dapo_mcore.rollout.sglang.launch.process import OwnedServer
from dapo_mcore.rollout.sglang.launch.ray_servers import start_ray_servers
from dapo_mcore.rollout.sglang.launch.servers import ServerPlan, start_servers
from dapo_mcore.rollout.sglang.launch.startup import Startup
from dapo_mcore.rollout.sglang.pool.checksums import Checksums
from dapo_mcore.rollout.sglang.pool.pool import Fleet, Resync
from dapo_mcore.rollout.sglang.pool.server import Member, Patience, wait_until_healthy
from dapo_mcore.rollout.sglang.sync.disk import DiskTransfer
from dapo_mcore.rollout.sglang.sync.distributed import BroadcastTransfer, check_sync_host
from dapo_mcore.rollout.sglang.sync.tensor import TensorTransfer
from dapo_mcore.rollout.sglang.sync.transfer import Transfer


def new_transfer(settings: SGLangConfig, num_bytes: int, bucket_bytes: int, folder: Path) -> Transfer:
    """The way `settings.sync` of a model of `num_bytes`; `folder` names the run."""
    if settings.sync == "distributed":
        backend = "gloo" if settings.device == "cpu" else "nccl"
        return BroadcastTransfer(settings.sync_host, backend, settings.sync_timeout_s, settings.servers_per_group)
    if settings.sync == "tensor":
        return TensorTransfer(settings.urls, bucket_bytes)
    run = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:12]
    return DiskTransfer(Path(settings.sync_dir) / f"dapo_mcore-{run}", num_bytes)


def start_planned(plan: ServerPlan, ray_address: str | None) -> tuple[Sequence[OwnedServer], Callable[[], None]]:
    """The servers of the plan, which start now, and what ends the connection to those that own them."""
    if plan.settings.placement == "ray":
        return start_ray_servers(plan, ray_address)
    return start_servers(plan), lambda: None


async def open_fleet(
    settings: SGLangConfig,
    http: HttpClient,
    keys: Keys,
    processes: Sequence[OwnedServer],
    hf_config: PretrainedConfig,
    startup: Startup,
    *,
    resync: Resync | None,
    resumes: bool,
    may_starve: Callable[[], bool],
    tell: Callable[[str], None],
) -> Fleet:
    """A fleet of the servers in `processes` or at settings.urls, each checked.

    startup  is told how it goes; the rest as of Fleet.
    Raises ConfigError for a server that cannot be used.
    """
    s = settings
    places = [(process.url, process) for process in processes] or [(url, None) for url in s.urls]
    members = [Member(ServerApi(http, url, keys, s.sync_timeout_s), process=process) for url, process in places]
    router = Member(ServerApi(http, s.router_url, keys, s.sync_timeout_s)) if s.router_url else None
    if s.sync == "distributed":
        check_sync_host(s.sync_host, [url for url, _ in places])
    await asyncio.gather(*(_admit(member, s, hf_config, resumes, startup) for member in members))
    if router is not None:
        await probe_router(router.api, s.urls)
    patience = Patience(
        max_in_flight=s.max_in_flight * (len(members) if router else 1),
        health_interval_s=s.health_interval_s,
        health_timeout_s=s.health_timeout_s,
        start_timeout_s=s.start_timeout_s,
        step_timeout_s=s.sync_timeout_s,
        restart_budget=s.restart_budget,
    )
    checksums = Checksums() if s.verify_sync == "servers" else None
    return Fleet(members, patience, resync, router, checksums, resumes, may_starve, tell)


async def _admit(
    member: Member, settings: SGLangConfig, hf_config: PretrainedConfig, resumes: bool, startup: Startup
) -> None:
    if member.process is not None:
        try:
            await wait_until_healthy(member, settings.start_timeout_s, startup.waiting)
        except RolloutError as error:
            raise ConfigError(f"rollout.sglang: {error}") from error
    facts = await probe(member.api, hf_config, resumes=resumes)
    member.num_ranks, member.version = facts.num_ranks, facts.version
    if settings.verify_sync == "servers" and await member.api.checksums() is None:
        raise ConfigError(
            f"{member.api.url} tells no checksums of its weights, which rollout.sglang.verify_sync servers compares; "
            "SGLang tells them on GPUs, and from 0.5.23 on without: set verify_sync off"
        )
    startup.is_up()
