"""What a plan prints: the screen, and the same as JSON.

Change here: the words. Figures come from the other modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from typing import Any

from dapo_mcore.plan.batch import assumed
from dapo_mcore.plan.change import Changes, overrides
from dapo_mcore.plan.hardware import Entry, entries
from dapo_mcore.plan.held import GIB, Use
from dapo_mcore.plan.job import Job
from dapo_mcore.plan.memory import uses
from dapo_mcore.plan.parameters import whole_model
from dapo_mcore.plan.picture import WIDTH, bars, folded, keep, table
from dapo_mcore.plan.plan import Plan
from dapo_mcore.plan.remedies import Problem
from dapo_mcore.plan.suggest import Suggestion
from dapo_mcore.plan.train_time import TrainTime


def report(
    plan: Plan,
    gpu_name: str,
    problems: Sequence[Problem],
    suggestions: Sequence[Suggestion] | None,
    chosen: Sequence[str],
    *,
    all_figures: bool,
    width: int = WIDTH,
) -> list[str]:
    """Return the lines of a screen of `width` columns. chosen: names of figures that options have set."""
    lines = [
        *_head(plan, gpu_name),
        "",
        *_batch(plan),
        "",
        *bars(plan.memory, width),
        "",
        *table(plan.memory),
        *_host(plan),
    ]
    lines += ["", *_times(plan), "", *_problems(problems)]
    if suggestions is not None:
        lines += ["", *_suggestions(suggestions, plan)]
    lines += ["", *(_all_figures(plan, chosen) if all_figures else _figures(plan, chosen))]
    return folded(lines, width)


def _head(plan: Plan, gpu_name: str) -> Iterator[str]:
    job = plan.job
    config, servers = job.config, job.config.rollout.sglang
    who = (
        f"{job.num_train} train and {job.num_servers} generate"
        if job.num_servers
        else "all train, servers share them"
        if config.rollout.engine == "sglang"
        else "all train, one of them also generates"
    )
    yield f"{config.name} on {job.nodes} × {job.cluster.gpus_per_node} {gpu_name.upper()}: {who}"
    fp8 = f" with FP8 {config.model.fp8.recipe}" if config.model.fp8 else ""
    yield (
        f"  model    {job.architecture.name}, {whole_model(job.shape) / 1e9:.1f} B parameters, {config.model.dtype}{fp8}, "
        f"recompute {_list(config.model.recompute)}"
    )
    layers = "-".join(str(len(stage)) for stage in job.stages)
    yield f"  layout   {layout(plan)}" + (f", layers per stage {layers}" if job.pipeline > 1 else "")
    if config.rollout.engine == "sglang":
        place = "on the trainer's GPUs" if servers.colocated else "on GPUs of their own"
        ahead = ", one step ahead" if config.rollout.async_steps else ""
        yield f"  servers  {servers.num_servers} × TP{servers.tensor_parallel} {place}{ahead}, sync {servers.sync}"
        if job.nodes > 1 and servers.sync == "disk" and servers.sync_dir.startswith("/dev/shm"):
            yield "           rollout.sglang.sync_dir is /dev/shm, which only the first node sees: set a shared folder"
    else:
        yield "  servers  none: engine embedded generates in rank 0's process, with a model of its own"


def layout(plan: Plan) -> str:
    """Return the mesh in short: TP8·PP2·CP1·DP8."""
    job, parallel = plan.job, plan.job.config.parallel
    experts = f"·EP{parallel.expert_parallel}·ETP{parallel.expert_tensor_size}" if job.architecture.num_experts else ""
    chunks = f"·VPP{job.chunks}" if job.chunks > 1 else ""
    sequence = " with sequence parallelism" if parallel.sequence_parallel else ""
    return f"TP{job.tensor}·PP{job.pipeline}{chunks}·CP{job.context}·DP{job.data}{experts}{sequence}"


def _list(recompute: str | Sequence[str]) -> str:
    return recompute if isinstance(recompute, str) else "+".join(recompute)


def _batch(plan: Plan) -> Iterator[str]:
    batch, job = plan.batch, plan.job
    config = job.config
    size, budget = config.rollout.group_size, config.batch.max_tokens * job.context
    yield "One rollout step"
    yield (
        f"  generates  {batch.groups_generated:,.0f} prompts × {size} = {batch.responses:,.0f} responses of {batch.mean_response:,.0f} "
        f"tokens (at most {config.rollout.max_response_tokens:,}): {_amount(batch.responses * batch.mean_response)}"
    )
    yield (
        f"  keeps      {config.sampling.train_batch_prompts:,} groups ({batch.kept_ratio:.0%}) = {batch.train_samples:,} samples of "
        f"{batch.mean_sample:,.0f} tokens with prompt: {_amount(batch.train_samples * batch.mean_sample)}"
    )
    yield (
        f"  trains     {batch.updates} gradient steps of {config.batch.mini_batch_prompts} groups = {batch.samples:,} samples, "
        f"{batch.samples / job.data:,.0f} on each of {job.data} replicas"
    )
    yield (
        f"  packs      {batch.micro_batches} micro-batches per rank and gradient step, {batch.tokens:,.0f} of {budget:,} tokens; "
        f"at most {batch.imbalance - 1:.1%} more"
    )


def _amount(count: float) -> str:
    return keep(f"{count / 1e6:,.1f} M tokens")


def _host(plan: Plan) -> Iterator[str]:
    memory = plan.memory
    for use in (memory.host, memory.shared):
        if use.parts:
            told = {name: f"{nbytes / GIB:,.0f}" for name, nbytes in use.parts.items()}
            parts = " + ".join(keep(f"{name} {gib}") for name, gib in told.items() if gib != "0")
            yield f"  {use.where}: {use.total / GIB:,.0f} of {use.capacity / GIB:,.0f} GiB = {parts}"


def _times(plan: Plan) -> Iterator[str]:
    time, job = plan.time, plan.job
    rollout, train = time.rollout, time.train
    yield "Time of a rollout step, predicted" + ("; generation runs beside training" if time.is_async else "")
    rows = {
        "generation": (
            rollout.total,
            f"{rollout.per_server:,} at once on each of {rollout.num_servers}; {rollout.tokens_per_s:,.0f} tokens/s; "
            + ("rank 0 is slower" if rollout.is_host_bound else f"tail {rollout.tail:,.0f} s"),
        ),
        "scoring": (train.score_s, f"{train.num_scored + train.num_references} passes of {train.score.total:,.1f} s"),
        "gradient steps": (train.update_s, f"{train.num_updates} of {train.update.total:,.1f} s: {_shares(plan)}"),
        "critic": (train.critic_s, _critic(train)),
        "weight sync": (time.sync, f"{whole_model(job.shape) * job.dtype_bytes / 1e9:,.1f} GB"),
        "handover": (time.handover, "the actor to the host and back"),
    }
    longest = max(seconds for seconds, _ in rows.values())
    for name, (seconds, words) in rows.items():
        if seconds:
            yield f"  {name:15}{_seconds(seconds):>9}  {'█' * max(1, round(12 * seconds / longest)):12}  {words}"
    yield f"  {'step':15}{_seconds(time.total):>9}"
    yield (
        f"  {plan.tokens_per_s_per_gpu:,.0f} tokens/s per GPU; gradient steps reach {train.mfu(job):.1%} MFU "
        f"({train.flops / 1e15:,.0f} PFLOP a step)"
    )
    for own in plan.evaluations:
        yield (
            f"  evaluation of {own.name}: {own.responses:,} responses of at most {own.limit:,} tokens in "
            f"{_seconds(own.seconds).strip()}"
        )
    if job.config.num_rollout_steps is None:
        yield f"  num_epochs {job.config.num_epochs}: the number of steps follows from the data, which a plan does not read"
        return
    yield (
        f"  {job.config.num_rollout_steps:,} steps: {plan.run_hours / 24:,.1f} days, {plan.gpu_hours:,.0f} GPU-hours, without "
        f"evaluations and checkpoints"
    )


def _critic(train: TrainTime) -> str:
    if train.critic_update is None or train.critic_score is None:
        return ""
    return (
        f"{train.num_minis} passes of {train.critic_score.total:,.1f} s, {train.num_updates} gradient steps of "
        f"{train.critic_update.total:,.1f} s"
    )


def _shares(plan: Plan) -> str:
    update = plan.time.train.update
    parts = sorted(((getattr(update, own.name), own.name) for own in fields(update)), reverse=True)
    return ", ".join(f"{name.replace('_', ' ')} {seconds / update.total:.0%}" for seconds, name in parts[:3])


def _seconds(seconds: float) -> str:
    if seconds >= 1e6:
        return f"{seconds / 86400:,.0f} days"
    return f"{seconds:,.1f} s" if seconds < 100 else f"{seconds:,.0f} s"


def _problems(problems: Sequence[Problem]) -> Iterator[str]:
    if not problems:
        yield "Everything fits into memory."
        return
    yield "What does not fit"
    for problem in problems:
        yield f"  {problem.where}: {problem.missing / GIB:,.1f} GiB too much; most of it is {problem.culprit}"
        for remedy in problem.remedies:
            verdict = "fits" if remedy.fits else "still too much"
            yield f"    -{remedy.saved / GIB:,.1f} GiB, {verdict}: {_overrides(remedy.changes)}"
        if not problem.remedies:
            yield "    no single setting helps; see --suggest, or take more nodes"


def _suggestions(suggestions: Sequence[Suggestion], plan: Plan) -> Iterator[str]:
    if not suggestions:
        yield "Suggestions: no layout fits on these GPUs; take more nodes or shorter sequences"
        return
    yield (
        f"Suggestions, fastest first, but of those within 2 % the simplest "
        f"(given: {_seconds(plan.time.total)}{'' if plan.fits else ', does not fit'})"
    )
    for number, own in enumerate(suggestions, 1):
        servers, mesh = own.plan.job.config.rollout.sglang, layout(own.plan).replace(" with sequence parallelism", "")
        fp8 = f" (FP8 {_seconds(own.in_fp8.time.total)})" if own.in_fp8 else ""
        yield (
            f"  {number}. {_seconds(own.plan.time.total):>8}{fp8}  {mesh}, recompute "
            f"{_list(own.plan.job.config.model.recompute)}, servers {servers.num_servers} × TP{servers.tensor_parallel}"
        )
        yield f"               {own.reason}"
    yield f"  Number 1: {_overrides(suggestions[0].changes)}"


def _overrides(changes: Changes) -> str:
    return " ".join(map(keep, overrides(changes)))


def _figures(plan: Plan, chosen: Sequence[str]) -> Iterator[str]:
    """Yield all figures in short, by source."""
    found = _entries(plan.job, chosen)
    yield "Figures behind this plan (--figures explains each; --assume NAME=VALUE replaces one)"
    for source in dict.fromkeys(entry.source for entry in found):
        own = [keep(f"{entry.name} {entry.value:g}") for entry in found if entry.source == source]
        title = {"measured": "measured on one H100", "vendor": "vendor's", "guess": "guessed"}.get(source, source)
        yield f"  {title}: {', '.join(own)}"


def _all_figures(plan: Plan, chosen: Sequence[str]) -> Iterator[str]:
    yield "Figures behind this plan (--assume NAME=VALUE replaces one)"
    for name, value, unit, source, note in _entries(plan.job, chosen):
        yield f"  {name:23}{value:>9g} {unit:15}{source:9}{note}"


def _entries(job: Job, chosen: Sequence[str]) -> list[Entry]:
    return list(entries(job.gpu, assumed(job.config, job.assume), chosen=chosen))


def as_json(
    plan: Plan, problems: Sequence[Problem], suggestions: Sequence[Suggestion] | None, chosen: Sequence[str]
) -> dict[str, Any]:
    """Return the plan as JSON values. Bytes and seconds are numbers."""
    job = plan.job
    found: dict[str, Any] = {
        "name": job.config.name,
        "layout": layout(plan),
        "fits": plan.fits,
        "gpus": {"train": job.num_train, "servers": job.num_servers, "nodes": job.nodes},
        "parameters": whole_model(job.shape),
        "batch": asdict(plan.batch),
        "memory": [_use(use) for use in uses(plan.memory)],
        "kv_cache_tokens": plan.memory.server.kv_tokens,
        "time": asdict(plan.time) | {"step": plan.time.total},
        "evaluations": [asdict(own) for own in plan.evaluations],
        "mfu": plan.time.train.mfu(job),
        "tokens_per_s_per_gpu": plan.tokens_per_s_per_gpu,
        "run_hours": plan.run_hours if plan.job.config.num_rollout_steps else None,
        "gpu_hours": plan.gpu_hours if plan.job.config.num_rollout_steps else None,
        "problems": [asdict(problem) for problem in problems],
        "figures": [entry._asdict() for entry in _entries(job, chosen)],
    }
    if suggestions is not None:
        found["suggestions"] = [
            {
                "changes": dict(own.changes),
                "step": own.plan.time.total,
                "layout": layout(own.plan),
                "reason": own.reason,
            }
            for own in suggestions
        ]
    return found


def _use(use: Use) -> dict[str, Any]:
    return {"where": use.where, "parts": use.parts, "total": use.total, "capacity": use.capacity, "fits": use.fits}
