"""The ranks that send weights to servers by broadcasts: rank 0, and leaders of other parts of the weight stream.

Change here: which ranks lead, and how they are found to reach the servers. What a leader does is in rollout/sglang/sync.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from functools import partial

from transformers import PretrainedConfig

from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.actor.weight_stream import ONE_LEADER, leading_ranks
from dapo_mcore.architecture.manifest import WeightManifest
from dapo_mcore.config.schema import Config
from dapo_mcore.process.launcher import routed_address
from dapo_mcore.rollout.sglang.engine import SGLangEngine
from dapo_mcore.rollout.sglang.sync.address import is_loopback, unreachable
from dapo_mcore.rollout.sglang.sync.leader import Leader
from dapo_mcore.rollout.sglang.sync.parts import OtherLeaders
from dapo_mcore.rollout.sglang.sync.weight_format import as_served


def open_leaders(
    config: Config,
    hf_config: PretrainedConfig,
    layout: Layout,
    engine: SGLangEngine | None,
    tell: Callable[[str], None],
) -> tuple[tuple[int, ...], Leader | None]:
    """Return the ranks that lead a part of the stream, and this rank's Leader; None on rank 0 and on ranks that do not lead.

    engine  on rank 0, with its servers up. It knows the other leaders afterwards.
    tell    shows a line, on rank 0.
    Rank 0 leads alone if weights do not travel whole by broadcasts, and if another leader cannot reach every server.
    Collective over the control group, if the layout has several leaders.
    """
    settings = config.rollout.sglang
    broadcasts = config.rollout.engine == "sglang" and settings.sync == "distributed"
    several = broadcasts and not settings.colocated and not settings.delta  # changes are counted on rank 0
    ranks = leading_ranks(layout, settings.senders) if several else ONE_LEADER
    if ranks == ONE_LEADER:
        return ranks, None
    token, urls = layout.broadcast_object(
        (secrets.token_hex(32), [server.url for server in engine.pool.servers]) if layout.is_controller else None
    )
    address = sender_address(settings.sync_host, os.environ)
    missing = unreachable(urls, address, settings.connect_timeout_s) if layout.rank in ranks[1:] else []
    problems = layout.gather_objects(f"rank {layout.rank} at {address}: {', '.join(missing)}" if missing else None)
    problem = layout.broadcast_object(next(filter(None, problems), None))
    if problem is not None:
        if layout.is_controller:
            tell(f"rank 0 sends all weights alone, since other senders do not reach the servers: {problem}")
        return ONE_LEADER, None
    leader = layout.on_every_rank_or_raise(
        lambda: new_leader(config, hf_config, layout, address, token) if layout.rank in ranks[1:] else None
    )
    found = layout.gather_objects(leader and leader.url)
    if layout.is_controller:
        engine.lead(OtherLeaders([url for url in found if url], token, settings.sync_timeout_s))
    return ranks, leader


def new_leader(config: Config, hf_config: PretrainedConfig, layout: Layout, address: str, token: str) -> Leader:
    """Return the Leader of this rank, which rank 0 and the servers reach at `address`."""
    settings = config.rollout.sglang
    tied = WeightManifest.of_config(hf_config).tied
    return Leader(
        address,
        token,
        backend="gloo" if settings.device == "cpu" else "nccl",
        device=layout.device,
        as_served=partial(as_served, hf_config=hf_config, tied=tied, quantize=settings.quantize),
        bucket_bytes=settings.bucket_mib << 19,
        timeout_s=settings.sync_timeout_s,
        patience_s=60.0 * config.parallel.timeout_minutes,
    )


def sender_address(sync_host: str, environment: Mapping[str, str]) -> str:
    """Return this machine's address for servers: `sync_host` on rank 0's machine, elsewhere that of the way to it."""
    if environment.get("GROUP_RANK") == "0":  # torchrun's number of this machine
        return sync_host
    return routed_address(environment if is_loopback(sync_host) else {"MASTER_ADDR": sync_host})
