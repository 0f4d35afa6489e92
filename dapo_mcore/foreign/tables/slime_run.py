"""Rules of slime's table about the run: its length, model, data, batches, optimizer, servers, checkpoints and loggers.

Change here: how flags of slime that together say one thing become ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dapo_mcore.foreign.table import Outcome, Source, asked, became, gone
from dapo_mcore.foreign.tables.slime_objective import NO_LIMIT


def length(source: Source) -> Iterator[Outcome]:
    """Yield the length of the run. num-rollout wins over num-epoch."""
    if source["num-rollout"] is not None:
        yield became(source, "num_rollout_steps", source["num-rollout"], "num-rollout")
        if source.gives("num-epoch"):
            yield Outcome("meaningless", ("num-epoch",), note="num-rollout ends the run")
    elif source["num-epoch"] is not None:
        yield became(source, "num_epochs", source["num-epoch"], "num-epoch")
    else:
        yield asked("num_rollout_steps", "the script says no length", "num-rollout")


def files(source: Source) -> Iterator[Outcome]:
    """Yield the prompts and how they are read."""
    path = source.path("prompt-data")
    if path is None:
        yield asked("data.files", "the script names no file", "prompt-data")
    else:
        yield Outcome("converted", ("prompt-data",), "data.files", [str(path)], "a list")
    template = bool(source["apply-chat-template"])
    yield became(source, "data.chat_template", template, "apply-chat-template")
    yield became(source, "data.shuffle", bool(source["rollout-shuffle"]), "rollout-shuffle")
    yield Outcome("converted", ("prompt-data",), "data.deduplicate", False, "slime keeps repeated rows")
    longest = source["rollout-max-prompt-len"]
    if longest is not None:
        yield became(source, "data.max_prompt_tokens", longest, "rollout-max-prompt-len")
        yield Outcome(
            "converted", ("rollout-max-prompt-len",), "data.on_long_prompt", "drop", "longer ones are left out"
        )


def batch(source: Source) -> Iterator[Outcome]:
    """Yield gradient steps and micro-batches. slime counts samples, in which a group's are together."""
    size, steps, prompts = "global-batch-size", "num-steps-per-rollout", source["rollout-batch-size"]
    group = source["n-samples-per-prompt"]
    if source[size] is not None and source[size] % group == 0:
        yield became(
            source,
            "batch.mini_batch_prompts",
            source[size] // group,
            size,
            note=f"{source[size]} samples / {group} per prompt",
        )
    elif source[size] is not None:
        yield asked(
            "batch.mini_batch_prompts", f"{source[size]} samples are no whole number of groups of {group}", size
        )
    elif prompts is not None:
        per_step = prompts // (source[steps] or 1)
        yield became(
            source, "batch.mini_batch_prompts", per_step, steps, note=f"{prompts} prompts / {source[steps] or 1} steps"
        )
    if source[size] is not None and source.gives(steps):
        yield Outcome("meaningless", (steps,), note="global-batch-size says it")
    yield Outcome("converted", ("rollout-shuffle",), "batch.shuffle", False, "slime trains in the order of generation")
    yield from _tokens(source)


def _tokens(source: Source) -> Iterator[Outcome]:
    ranks, budget = source["context-parallel-size"], source["max-tokens-per-gpu"]
    response = source["rollout-max-response-len"]
    if response is None:
        return
    longest = (source["rollout-max-prompt-len"] or 2048) + response
    if source["use-dynamic-batch-size"] and budget is not None:
        least = -(-longest // ranks)
        note = "" if budget >= least else f"at least the longest sequence: {longest} tokens on {ranks} ranks"
        yield became(source, "batch.max_tokens", max(budget, least), "max-tokens-per-gpu", note=note)
    else:
        samples = source["micro-batch-size"]
        note = f"{samples} × {longest} tokens / {ranks} ranks"
        yield became(source, "batch.max_tokens", -(-samples * longest // ranks), "micro-batch-size", note=note)


def schedule(source: Source) -> Iterator[Outcome]:
    """Yield the learning rate's schedule, in gradient steps as slime counts it."""
    kind, key = source["lr-decay-style"], "lr-decay-style"
    if kind not in ("constant", "cosine"):
        yield gone(f"the schedule {kind}; nearest: cosine, or constant", key)
    yield became(source, "optimizer.schedule", "cosine" if kind == "cosine" else "constant", key)
    yield became(source, "optimizer.warmup_updates", source["lr-warmup-iters"], "lr-warmup-iters")
    if kind == "cosine":
        yield became(source, "optimizer.min_lr", source["min-lr"], "min-lr")
        if source["lr-decay-iters"] is None:
            yield asked("optimizer.decay_updates", "the cosine lasts as long as the run, in gradient steps", key)
        else:
            yield became(source, "optimizer.decay_updates", source["lr-decay-iters"], "lr-decay-iters")
    if source["optimizer"] != "adam":
        yield gone(f"the optimizer {source['optimizer']}; nearest: AdamW", "optimizer")
    if source["optimizer-cpu-offload"]:
        part = source["optimizer-offload-fraction"]
        part = 1.0 if part is None else part
        yield Outcome(
            "converted", ("optimizer-cpu-offload",), "optimizer.offload_fraction", part, "the state on the host"
        )


def model(source: Source) -> Iterator[Outcome]:
    """Yield the model, its dtype and what is recomputed."""
    path = source.path("hf-checkpoint")
    yield (
        became(source, "model.path", path, "hf-checkpoint")
        if path
        else asked("model.path", "no hf-checkpoint", "hf-checkpoint")
    )
    yield Outcome(
        "converted", ("hf-checkpoint",), "model.dtype", "bf16", "computes in bf16 with fp32 copies of the weights"
    )
    level, modules = source["recompute-granularity"], source["recompute-modules"]
    used = source.below_flag("recompute-") or ["recompute-granularity"]
    recompute: Any = modules if level == "selective" and isinstance(modules, list) else level or "none"
    yield Outcome("converted", tuple(used), "model.recompute", recompute, "full: every layer by itself")


def server_places(source: Source) -> Iterator[Outcome]:
    """Yield the engine, the GPUs of one server, and whose GPUs it takes."""
    key, size, machine = (
        "rollout-num-gpus-per-engine",
        source["rollout-num-gpus-per-engine"],
        source["num-gpus-per-node"],
    )
    yield Outcome("converted", (key,), "rollout.engine", "sglang", "servers")
    if size > machine:
        note = f"slime's servers have {size} GPUs each, ours at most the {machine} of a node: does the model fit, or in fp8?"
        yield asked("rollout.sglang.tensor_parallel", note, key)
    else:
        yield became(source, "rollout.sglang.tensor_parallel", size, key)
    shared = bool(source["colocate"])
    note = "servers and training take turns on the GPUs" if shared else "servers have GPUs of their own"
    yield Outcome("converted", ("colocate",), "rollout.sglang.colocated", shared, note)
    yield Outcome("converted", ("colocate",), "rollout.sglang.sync", "tensor" if shared else "distributed", note)
    if source.run.entry == "train_async.py":
        yield Outcome("converted", (source.run.entry,), "rollout.async_steps", 1, "generated one step ahead")
        yield Outcome("converted", (source.run.entry,), "reward.workers", 8, "scoring may not hold up training")


def num_servers(source: Source) -> Iterator[Outcome]:
    """Yield the number of servers, from the GPUs that generate, and their nodes."""
    shared, own, machine = bool(source["colocate"]), source["rollout-num-gpus"], source["num-gpus-per-node"]
    is_own = own is not None and not shared
    keys = ("rollout-num-gpus",) if is_own else ("actor-num-nodes", "actor-num-gpus-per-node")
    gpus = own if is_own else source[keys[0]] * source[keys[1]]
    size = source["rollout-num-gpus-per-engine"]
    if size <= machine and gpus % size == 0:
        used = (*keys, "rollout-num-gpus-per-engine")
        yield Outcome("converted", used, "rollout.sglang.num_servers", gpus // size, f"{gpus} GPUs / {size}")
    else:
        note = f"{gpus} GPUs do not divide into servers of {size} on one node"
        yield asked("rollout.sglang.num_servers", note, *keys)
    if gpus > machine:
        yield Outcome("converted", keys, "rollout.sglang.placement", "nodes", f"{gpus} GPUs on nodes of {machine}")
        yield Outcome("converted", keys, "rollout.sglang.host", "node", "each node's own address")


def server_args(source: Source) -> Iterator[Outcome]:
    """Yield SGLang's own options: those of slime without `sglang-`."""
    for key in source.below_flag("sglang-"):
        option = {key.removeprefix("sglang-"): source[key]}
        yield Outcome("converted", (key,), "rollout.sglang.server_args", option, "without sglang-")


def evaluation(source: Source) -> Iterator[Outcome]:
    """Yield the evaluation sets and how they are sampled: as in training unless something else is set."""
    key, every, skip = "eval-prompt-data", "eval-interval", "skip-eval-before-train"
    listed = source.path(key) or []
    if not listed or source[every] is None:
        for name in (key, every, skip):
            if source.gives(name):
                yield Outcome("meaningless", (name,), note="nothing is evaluated")
        return
    yield became(source, "eval.every", source[every], every)
    yield became(source, "eval.at_start", not source[skip], skip)
    pairs = list(zip(listed[::2], listed[1::2], strict=False)) if len(listed) > 1 else [("eval", listed[0])]
    for name, path in pairs:
        yield from _set(source, f"eval.sets.{name}", str(path))
    for flag, ours, train in (
        ("temperature", "temperature", "rollout-temperature"),
        ("top-p", "top_p", "rollout-top-p"),
        ("top-k", "top_k", "rollout-top-k"),
    ):
        own = f"eval-{flag}"
        used = own if source[own] is not None else train
        yield became(source, f"eval.{ours}", source[used], used, note="" if used == own else "unset: as in training")
    yield became(source, "eval.samples_per_prompt", source["n-samples-per-eval-prompt"], "n-samples-per-eval-prompt")
    if source["eval-max-response-len"] is not None:
        yield became(source, "eval.max_response_tokens", source["eval-max-response-len"], "eval-max-response-len")


def _set(source: Source, place: str, path: str) -> Iterator[Outcome]:
    yield Outcome("converted", ("eval-prompt-data",), f"{place}.files", [path], "a named set per file")
    for own, train, ours in (
        ("eval-input-key", "input-key", "prompt_key"),
        ("eval-label-key", "label-key", "answer_key"),
    ):
        used = own if source[own] is not None else train
        if source[used] is not None:
            yield Outcome("same", (used,), f"{place}.{ours}", source[used])
    yield Outcome(
        "converted",
        ("eval-prompt-data",),
        f"{place}.chat_template",
        bool(source["apply-chat-template"]),
        "as in training",
    )
    yield Outcome("converted", ("eval-prompt-data",), f"{place}.deduplicate", False, "slime keeps repeated rows")


def saving(source: Source) -> Iterator[Outcome]:
    """Yield checkpoints: slime keeps all of them."""
    if source.path("save") is not None:
        yield became(
            source, "output_dir", str(source.path("save")).rstrip("/"), "save", note="the run is in output_dir/name"
        )
    every = source["save-interval"]
    yield became(source, "checkpoint.every", every, "save-interval")
    if every is not None:
        yield Outcome("converted", ("save-interval",), "checkpoint.keep", NO_LIMIT, "slime keeps all")
    if source["save-hf"] is not None and every is not None:
        yield Outcome(
            "converted", ("save-hf",), "checkpoint.export_every", every, "with each checkpoint, in the run's folder"
        )


def loggers(source: Source) -> Iterator[Outcome]:
    """Yield the loggers."""
    yield became(source, "observe.tensorboard", bool(source["use-tensorboard"]), "use-tensorboard")
    if source["use-wandb"]:
        project = source["wandb-project"]
        yield became(
            source,
            "observe.wandb_project",
            project or "slime",
            "wandb-project" if project else "use-wandb",
            note="" if project else "unnamed there",
        )
    elif source.gives("wandb-project"):
        yield Outcome("meaningless", ("wandb-project",), note="use-wandb is off")
