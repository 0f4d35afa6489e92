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
from dapo_mcore.plan.rollout_time import RolloutTime, rollout_time
from dapo_mcore.plan.step_time import step_time
from dapo_mcore.plan.train_time import Pass

_SIZES = (1, 2, 4, 8)
_STAGES = (1, 2, 4, 8, 16)
_EXPERTS = (1, 2, 4, 8, 16, 32)
_CONTEXT = (1, 2, 4)
_CHUNKS = (1, 2, 4)
_FEWEST_LAYERS = 2
"""Chunks of fewer layers send more than they compute."""
_ROOM = 0.92
"""The part of a GPU that a suggestion may fill while it trains. Peaks are predicted to within 10 % (tests/plan/h100.py)."""
_ALIKE = 1.02
"""Times within this factor are alike: a prediction is not better than that."""


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
    """Return the fastest layouts that fit on the plan's GPUs. Of those that are nearly as fast as the first, the simplest come first."""
    servers = _servers(plan.job)
    found = _estimates(servers, _ROOM) or _estimates(servers, 1.0)
    exact = [(changes, other) for changes, own in _ranked(found)[: count + 3] if (other := make_plan(own.job)).fits]
    return [
        Suggestion(_news(plan.job, changes), own, _reason(plan, own), _in_fp8(own))
        for changes, own in _ranked(exact)[:count]
    ]


def _estimates(servers: list[tuple[Changes, Job]], room: float) -> list[tuple[Changes, Plan]]:
    return [({**placed, **changes}, own) for placed, job in servers for changes, own in _layouts(job, room)]


def _ranked(found: list[tuple[Changes, Plan]]) -> list[tuple[Changes, Plan]]:
    """Return the layouts in the order of a report, without a second one that differs only in its chunks of layers."""
    fastest = min((own.time.total for _, own in found), default=0.0)

    def order(entry: tuple[Changes, Plan]) -> tuple[bool, int, bool, float]:
        job, time = entry[1].job, entry[1].time
        if time.total > _ALIKE * fastest:
            return True, 0, False, time.total
        return False, _kinds(job), job.context > 1, time.work

    kept: dict[tuple[int, ...], tuple[Changes, Plan]] = {}
    for changes, own in sorted(found, key=order):
        job = own.job
        same = (job.tensor, job.pipeline, job.context, job.config.parallel.expert_parallel, job.num_servers)
        kept.setdefault(same, (changes, own))
    return list(kept.values())


def _kinds(job: Job) -> int:
    """Return how many kinds of parallelism a layout has beside data parallelism."""
    sizes = (job.tensor, job.pipeline, job.chunks, job.context, job.config.parallel.expert_parallel)
    return sum(size > 1 for size in sizes)


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


def _estimate(job: Job, rollout: RolloutTime | None = None) -> Plan:
    batch = batch_of(job, exact=False)
    memory = memory_of(job, batch)
    return Plan(job, batch, memory, step_time(job, batch, memory, rollout))


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


def _layouts(job: Job, room: float) -> Iterator[tuple[Changes, Plan]]:
    """Yield every mesh that fits, with the mildest recomputation that lets it fit, and estimated micro-batches."""
    rollout = None if job.is_embedded else _estimate(job).time.rollout  # the mesh does not change it
    for mesh in _meshes(job):
        mildest = _mildest(job, mesh, room)
        if mildest is None:
            continue
        for chunks in _CHUNKS:
            changes = {**mesh, **mildest, "parallel.virtual_pipeline_parallel": chunks}
            if chunks > 1 and (mesh["parallel.pipeline_parallel"] == 1 or _too_short(job, mesh, chunks)):
                break
            other = changed(job, changes)
            if other is None or not _fits(other, room):
                break
            yield changes, _estimate(other, rollout)


def _mildest(job: Job, mesh: Changes, room: float) -> Changes | None:
    """Return the recomputation that costs least and lets the mesh fit; None if it cannot fit or a rule refuses it."""
    experts = job.architecture.num_experts
    full, *milder = [
        {"model.offload_activations": False, "model.recompute": mode}
        for mode in ("full", "none", ["moe"] if experts else ["mlp"])
    ]
    for recompute in (full, *milder):
        other = changed(job, {**mesh, **recompute})
        fits = other is not None and _fits(other, room)
        if recompute is full and not fits:
            return None
        if recompute is not full and fits:
            return recompute
    return full


def _fits(job: Job, room: float) -> bool:
    memory = memory_of(job, batch_of(job, exact=False))
    return memory.fits and memory.worst.total <= room * memory.worst.capacity


def _too_short(job: Job, mesh: Changes, chunks: int) -> bool:
    return mesh["parallel.pipeline_parallel"] * chunks * _FEWEST_LAYERS > job.shape.num_layers


def _meshes(job: Job) -> Iterator[dict[str, Any]]:
    config = job.config
    experts = _EXPERTS if job.architecture.num_experts else (1,)
    for tensor, pipeline, context, expert in product(_SIZES, _STAGES, _CONTEXT, experts):
        if job.num_train % (tensor * pipeline * context) or tensor > job.cluster.gpus_per_node:
            continue
        changes = {
            "parallel.tensor_parallel": tensor,
            "parallel.pipeline_parallel": pipeline,
            "parallel.virtual_pipeline_parallel": 1,
            "parallel.context_parallel": context,
            "parallel.expert_parallel": expert,
            "parallel.expert_tensor_parallel": None,
            "parallel.data_parallel": None,
            "parallel.sequence_parallel": tensor > 1,
        }
        if context > 1:
            changes["batch.max_tokens"] = -(-config.batch.max_tokens * job.context // context)
        yield changes


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
    yield "critic", after.train.critic_s - before.train.critic_s
    yield "sync and handover", after.sync + after.handover - before.sync - before.handover
    for part in fields(Pass):
        old, new = getattr(before.train.update, part.name), getattr(after.train.update, part.name)
        yield part.name.replace("_", " "), after.train.num_updates * new - before.train.num_updates * old
