"""The rollout engine that a configuration asks for.

Change here: a new engine. What every engine must do is types.RolloutEngine.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from dapo_mcore.config.schema import Config
from dapo_mcore.config.sglang import SGLangConfig
from dapo_mcore.data.stops import StopTexts
from dapo_mcore.observe.progress import NullProgress
from dapo_mcore.rollout.embedded import EmbeddedEngine

SERVERS = "servers"
"""Folder inside a run's folder for the logs and keys of its rollout servers."""


def build_engine(
    config: Config,
    hf_config: PretrainedConfig,
    *,
    stop_token_ids: Sequence[int],
    stop_texts: StopTexts | None = None,
    pad_token_id: int,
    num_local_ranks: int,
    nodes: Sequence[Any] = (),
    peers: Any = None,
    progress: NullProgress,
) -> Any:
    """Return the engine, a types.RolloutEngine with `on_progress`. SGLang servers are ready when it returns.

    num_local_ranks  number of trainer processes on this machine, each with its own GPU if there are GPUs.
    nodes            of the job, each a launch.node_servers.Node, for servers with placement nodes.
    peers            what `build_peer` returned on this rank.
    progress         shows how the servers start.
    Raise ConfigError if servers cannot be started or used.
    """
    dtype = torch.bfloat16 if config.model.dtype == "bf16" else torch.float32
    if config.rollout.engine == "sglang":
        from dapo_mcore.rollout.sglang.engine import SGLangEngine  # the embedded engine does not need its HTTP client

        return SGLangEngine(
            _server_settings(config, num_local_ranks),
            hf_config,
            stop_token_ids=stop_token_ids,
            stop_texts=stop_texts,
            dtype=dtype,
            folder=config.run_dir / SERVERS,
            max_lag=config.sampling.max_staleness if config.sampling.on_full == "keep" else 0,
            progress=progress,
            ray_address=config.ray.address,
            nodes=nodes,
            relays=peers,
        )
    return EmbeddedEngine(
        hf_config,
        stop_token_ids=stop_token_ids,
        stop_texts=stop_texts,
        dtype=dtype,
        pad_token_id=pad_token_id,
        max_batch=config.rollout.max_batch,
        num_threads=config.rollout.num_threads or psutil.cpu_count(logical=False),
        device="cuda" if torch.cuda.is_available() else "cpu",
    )


def build_peer(config: Config, parents: Sequence[int], device: torch.device) -> Any:
    """Return this rank's part in weight syncs besides sending its shards: on rank 0 what `build_engine` takes as `peers`, elsewhere
    a types.SyncPeer. None if the rank has no such part.

    parents  ranks that are the parents of their nodes' servers, in the order of `nodes`.
    device   of this rank's weights.
    Collective: may create process groups, so every rank must call it.
    """
    servers = config.rollout.sglang
    ranks = parents[: servers.num_servers]  # servers are spread in turn over the nodes, so others have none
    if config.rollout.engine != "sglang" or servers.sync != "tensor" or servers.placement != "nodes" or len(ranks) < 2:
        return None
    from dapo_mcore.rollout.sglang.sync.relay import Relay, RelayGroup, Relays

    rank = dist.get_rank()
    group = RelayGroup(ranks, device, timedelta(minutes=config.parallel.timeout_minutes))
    if rank not in ranks:
        return None
    return Relay(group) if rank else Relays(group)


def _server_settings(config: Config, num_local_ranks: int) -> SGLangConfig:
    """Return the settings with `first_gpu` set (after the trainer's GPUs, or 0 if colocated), and the option of a deterministic
    run, which SGLang has on GPUs only."""
    settings, changes = config.rollout.sglang, {}
    if settings.first_gpu is None:
        changes["first_gpu"] = 0 if settings.colocated else num_local_ranks
    if config.deterministic and settings.device == "cuda":
        changes["server_args"] = {"enable-deterministic-inference": True} | settings.server_args
    return settings.model_copy(update=changes)
