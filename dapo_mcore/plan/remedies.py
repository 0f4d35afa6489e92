"""What does not fit, what is to blame, and which setting helps by how much.

Change here: the settings that a plan tries. Each is planned in full, so its effect is counted, not estimated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dapo_mcore.plan.batch import batch_of
from dapo_mcore.plan.change import Changes, changed
from dapo_mcore.plan.held import GIB, Use
from dapo_mcore.plan.job import Job
from dapo_mcore.plan.memory import Memory, Server, memory_of
from dapo_mcore.plan.plan import Plan


@dataclass(frozen=True)
class Remedy:
    """A setting that lowers what is missing. saved: bytes of it. fits: True if the use fits then."""

    changes: Changes
    saved: float
    fits: bool


@dataclass(frozen=True)
class Problem:
    """Something that does not fit. missing: bytes; culprit: the largest part, in words. Remedies that fit come first, then the best."""

    where: str
    missing: float
    culprit: str
    remedies: tuple[Remedy, ...]


def problems(plan: Plan) -> list[Problem]:
    """Return all that does not fit, the training GPU first."""
    found = [
        _problem(plan, lambda memory: memory.worst, _train),
        _problem(plan, lambda memory: memory.sync, _sync),
        _problem(plan, lambda memory: memory.server, _server),
        _problem(plan, lambda memory: memory.host, _host),
        _problem(plan, lambda memory: memory.shared, _host),
    ]
    return [problem for problem in found if problem is not None]


def _problem(
    plan: Plan, pick: Callable[[Memory], Use | Server], tried: Callable[[Job], Iterator[Changes]]
) -> Problem | None:
    given = pick(plan.memory)
    if given.fits:
        return None
    remedies = []
    for changes in tried(plan.job):
        if (other := changed(plan.job, changes)) is None:
            continue
        now = pick(memory_of(other, batch_of(other)))
        if now.missing < given.missing - 0.01 * GIB:
            remedies.append(Remedy(changes, given.missing - now.missing, now.fits))
    return Problem(given.where, given.missing, given.culprit, _best(remedies))


def _best(remedies: list[Remedy], most: int = 4) -> tuple[Remedy, ...]:
    return tuple(sorted(remedies, key=lambda own: (not own.fits, -own.saved if not own.fits else 0))[:most])


def servers_on_all(job: Job, tensor: int = 0) -> Changes:
    """Return the settings of SGLang servers that share all training GPUs."""
    every, per_node = job.num_train + job.num_servers, job.cluster.gpus_per_node
    size = tensor or min(per_node, every)
    servers = job.config.rollout.sglang
    changes: dict[str, Any] = {}
    if every > per_node and servers.placement == "local":
        changes |= {"rollout.sglang.placement": "nodes", "rollout.sglang.host": "node"}
    if servers.sync == "distributed" or every > per_node:  # NCCL refuses two processes on one GPU
        changes["rollout.sglang.sync"] = "disk" if servers.placement == "ray" else "tensor"
    return changes | {
        "rollout.engine": "sglang",
        "rollout.sglang.colocated": True,
        "rollout.sglang.tensor_parallel": size,
        "rollout.sglang.num_servers": max(1, every // size),
    }


def _train(job: Job) -> Iterator[Changes]:
    """Yield settings that lower memory while training, those that cost least first."""
    config, parallel = job.config, job.config.parallel
    if job.is_embedded:
        yield servers_on_all(job)
    if not config.optimizer.distributed:
        yield {"optimizer.distributed": True}
    if job.tensor > 1 and not parallel.sequence_parallel:
        yield {"parallel.sequence_parallel": True}
    yield {"batch.head_chunk_tokens": 512}
    yield {"model.recompute": ["mlp"]}
    yield {"model.recompute": ["moe"]}
    yield {
        "parallel.tensor_parallel": 2 * job.tensor,
        "parallel.sequence_parallel": True,
        "parallel.data_parallel": None,
    }
    yield {"parallel.pipeline_parallel": 2 * job.pipeline, "parallel.data_parallel": None}
    yield {
        "parallel.context_parallel": 2 * job.context,
        "batch.max_tokens": -(-config.batch.max_tokens // 2),
        "parallel.data_parallel": None,
    }
    yield {"batch.max_tokens": -(-config.longest_sequence // job.context)}
    yield {"parallel.expert_parallel": 2 * parallel.expert_parallel}
    yield {"model.recompute": "full"}
    yield {"model.recompute": "full", "model.offload_activations": True}
    yield {"optimizer.offload_fraction": 1.0}


def _sync(job: Job) -> Iterator[Changes]:
    if job.is_embedded:
        yield servers_on_all(job)
    yield {"rollout.sglang.bucket_mib": 128}
    servers = job.config.rollout.sglang
    yield {
        "rollout.sglang.tensor_parallel": 2 * servers.tensor_parallel,
        "rollout.sglang.num_servers": max(1, servers.num_servers // 2),
    }


def _server(job: Job) -> Iterator[Changes]:
    servers = job.config.rollout.sglang
    if job.is_embedded:
        yield servers_on_all(job)
    for tensor in (2, 4, 8):
        if tensor > servers.tensor_parallel:
            count = max(1, servers.num_servers * servers.tensor_parallel // tensor)
            yield {"rollout.sglang.tensor_parallel": tensor, "rollout.sglang.num_servers": count}
    yield {"rollout.sglang.server_args": {**servers.server_args, "mem-fraction-static": 0.9}}
    yield {"rollout.sglang.quantize": "fp8"}


def _host(job: Job) -> Iterator[Changes]:
    yield {"rollout.sglang.sync": "distributed"}
    yield {"rollout.sglang.sync": "tensor"}
    yield {"rollout.sglang.colocated": False}
    yield {"checkpoint.async_save": False}
    yield {"rollout.sglang.delta": False}
    yield {"optimizer.offload_fraction": 0.0}
    yield {"model.offload_activations": False}
    yield {"optimizer.distributed": True}
    yield {"reward.workers": 8}
