"""Better layouts: every mesh, recomputation and share of servers that fits, ranked by the predicted time of a rollout step.

Change here: which settings are tried. Recomputation only slows a layout down, so a layout takes the first mode that fits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

from dapo_mcore.plan.batch import batch_of
from dapo_mcore.plan.change import Changes, changed
from dapo_mcore.plan.held import GIB
from dapo_mcore.plan.job import Job
from dapo_mcore.plan.memory import memory_of
from dapo_mcore.plan.plan import Plan, make_plan
from dapo_mcore.plan.remedies import servers_on_all
from dapo_mcore.plan.rollout_time import rollout_time
from dapo_mcore.plan.step_time import step_time
from dapo_mcore.plan.train_time import Pass

_SIZES = (1, 2, 4, 8)
_CONTEXT = (1, 2, 4)
_CHUNKS = (1, 2, 4)
_FEWEST_LAYERS = 2
"""Chunks of fewer layers send more than they compute."""


@dataclass(frozen=True)
class Suggestion:
    """Settings with their plan, and in one line why they are faster or slower than the given ones.

    in_fp8  the same in FP8, which changes rounding, if the given precision is bf16
    """

    changes: Changes
    plan: Plan
    reason: str
    in_fp8: Plan | None


def suggest(plan: Plan, count: int = 5) -> list[Suggestion]:
    """Return the fastest layouts that fit on the plan's GPUs, best first."""
    found = [({**placed, **changes}, own) for placed, job in _servers(plan.job) for changes, own in _layouts(job)]
    fastest = sorted(found, key=_seconds)[: count + 3]
    exact = [(changes, other) for changes, own in fastest if (other := make_plan(own.job)).fits]
    return [
        Suggestion(_news(plan.job, changes), own, _reason(plan, own), _in_fp8(own))
        for changes, own in sorted(exact, key=_seconds)[:count]
    ]


def _seconds(entry: tuple[Changes, Plan]) -> float:
    return entry[1].time.total


def _news(job: Job, changes: Changes) -> Changes:
    """Return the changes that differ from the job's configuration."""
    tree = job.config.model_dump()
    return {key: value for key, value in changes.items() if _value(tree, key) != value}


def _value(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def _in_fp8(own: Plan) -> Plan | None:
    """Return the same layout with FP8; None if it has FP8 already, or does not fit."""
    model = own.job.config.model
    job = changed(own.job, {"model.fp8": {"recipe": "blockwise"}}) if not model.fp8 and model.dtype == "bf16" else None
    other = _estimate(job) if job else None
    return other if other and other.fits else None


def _estimate(job: Job) -> Plan:
    batch = batch_of(job, exact=False)
    memory = memory_of(job, batch)
    return Plan(job, batch, memory, step_time(job, batch, memory))


def _servers(job: Job) -> list[tuple[Changes, Job]]:
    """Return the placements of servers to try: of each number of GPUs the size of servers that generates fastest."""
    config = job.config
    if config.rollout.engine == "sglang" and config.rollout.sglang.urls:
        return [({}, job)]
    sizes = [size for size in _SIZES if size <= job.cluster.gpus_per_node]
    options = [] if config.rollout.async_steps else [servers_on_all(job, size) for size in sizes]
    if config.rollout.engine == "sglang" and not config.rollout.sglang.colocated:
        options += _shares(job)
    best: dict[int, tuple[float, Changes, Job]] = {}
    for changes in options:
        own = changed(job, {**changes, "parallel.data_parallel": None})
        seconds = _generation(own) if own else math.inf
        if own and seconds < best.get(own.num_servers, (math.inf,))[0]:
            best[own.num_servers] = (seconds, changes, own)
    return [(changes, own) for _, changes, own in best.values()] or [({}, job)]


def _generation(job: Job) -> float:
    """Return the seconds of generation; infinity if the servers do not fit."""
    batch = batch_of(job, exact=False)
    memory = memory_of(job, batch)
    return rollout_time(job, batch, memory).total if memory.server.fits else math.inf


def _shares(job: Job) -> Iterator[Changes]:
    """Yield servers on a quarter, half and three quarters of all GPUs, in whole nodes where there are several."""
    every = job.num_train + job.num_servers
    for share in (0.25, 0.5, 0.75):
        unit = job.cluster.gpus_per_node if every > job.cluster.gpus_per_node else 1
        gpus = round(share * every / unit) * unit
        for size in _SIZES:
            if 0 < gpus < every and gpus % size == 0 and size <= job.cluster.gpus_per_node:
                yield {"rollout.sglang.tensor_parallel": size, "rollout.sglang.num_servers": gpus // size}


def _layouts(job: Job) -> Iterator[tuple[Changes, Plan]]:
    """Yield every mesh that fits, with the mildest recomputation that lets it fit, and estimated micro-batches."""
    for mesh in _meshes(job):
        for recompute in _recomputations(job):
            changes = {**mesh, "model.offload_activations": False, "model.recompute": recompute}
            if (other := changed(job, changes)) is None:
                break
            if memory_of(other, batch_of(other, exact=False)).fits:
                yield changes, _estimate(other)
                break


def _meshes(job: Job) -> Iterator[dict[str, Any]]:
    config = job.config
    experts = _SIZES if job.architecture.num_experts else (1,)
    for tensor, pipeline, chunks, context, expert in product(_SIZES, _SIZES, _CHUNKS, _CONTEXT, experts):
        if job.num_train % (tensor * pipeline * context) or tensor > job.cluster.gpus_per_node:
            continue
        if chunks > 1 and (pipeline == 1 or pipeline * chunks * _FEWEST_LAYERS > job.shape.num_layers):
            continue
        changes = {
            "parallel.tensor_parallel": tensor,
            "parallel.pipeline_parallel": pipeline,
            "parallel.virtual_pipeline_parallel": chunks,
            "parallel.context_parallel": context,
            "parallel.expert_parallel": expert,
            "parallel.expert_tensor_parallel": None,
            "parallel.data_parallel": None,
            "parallel.sequence_parallel": tensor > 1,
        }
        if context > 1:
            changes["batch.max_tokens"] = -(-config.batch.max_tokens * job.context // context)
        yield changes


def _recomputations(job: Job) -> list[Any]:
    """Return modes of recomputation, those that cost least first."""
    experts = job.architecture.num_experts
    return ["none", ["moe"] if experts else ["mlp"], "full"]


def _reason(given: Plan, own: Plan) -> str:
    """Return what makes the largest differences in seconds, and how full the GPU is."""
    differences = sorted(_differences(given, own), key=lambda entry: -abs(entry[1]))
    shown = [f"{name} {_text(seconds)}" for name, seconds in differences[:3] if abs(seconds) >= 1]
    full = f"{own.memory.worst.total / GIB:.0f} of {own.memory.worst.capacity / GIB:.0f} GiB"
    return ", ".join([*(shown or ["as given"]), full])


def _text(seconds: float) -> str:
    return f"{seconds:+,.0f} s" if abs(seconds) < 1e6 else f"{seconds / 86400:+,.0f} days"


def _differences(given: Plan, own: Plan) -> Iterator[tuple[str, float]]:
    before, after = given.time, own.time
    yield "generation", after.rollout.total - before.rollout.total
    yield "scoring", after.train.score_s - before.train.score_s
    yield "sync and handover", after.sync + after.handover - before.sync - before.handover
    for part in fields(Pass):
        old, new = getattr(before.train.update, part.name), getattr(after.train.update, part.name)
        yield part.name.replace("_", " "), after.train.num_updates * new - before.train.num_updates * old
