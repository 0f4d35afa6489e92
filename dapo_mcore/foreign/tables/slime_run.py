"""Rules of slime's table about the run: its length, model, data, batches, optimizer, servers, checkpoints and loggers.

Change here: how flags of slime that together say one thing become ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from dapo_mcore.foreign.table import Outcome, Source, asked, became, gone, own_way

_OUR_LONGEST_PROMPT = 2048
"""data.max_prompt_tokens, which holds where slime limits no prompt."""


def length(source: Source) -> Iterator[Outcome]:
    """Yield the length of the run. num-rollout wins over num-epoch, which there stands for steps: rows // rollout-batch-size each."""
    if source["num-rollout"] is not None:
        yield became(source, "num_rollout_steps", source["num-rollout"], "num-rollout")
        if source.gives("num-epoch"):
            yield Outcome("meaningless", ("num-epoch",), note="num-rollout ends the run")
    elif source["num-epoch"] is not None and source["dynamic-sampling-filter-path"] is not None:
        note = f"slime runs {source['num-epoch']} × (rows // rollout-batch-size) steps, however many prompts the filter takes"
        yield asked("num_rollout_steps", note, "num-epoch")
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
        yield from _rows(source, "prompt-data", "data", str(path))
    template = bool(source["apply-chat-template"])
    yield became(source, "data.chat_template", template, "apply-chat-template")
    yield from _template_kwargs(source, "data")
    yield became(source, "data.shuffle", bool(source["rollout-shuffle"]), "rollout-shuffle")
    yield own_way("data.deduplicate", False, "slime keeps repeated rows")
    longest, whole = source["rollout-max-prompt-len"], source["rollout-max-context-len"]
    if longest is None and whole is not None:
        yield from _longest("data", whole - 1, "rollout-max-context-len")
    else:
        yield from _longest("data", longest, "rollout-max-prompt-len")


def _template_kwargs(source: Source, place: str) -> Iterator[Outcome]:
    key = "apply-chat-template-kwargs"
    if source[key] and source["apply-chat-template"]:
        yield Outcome("same", (key,), f"{place}.chat_template_kwargs", source[key])
    elif source.gives(key):
        yield Outcome("meaningless", (key,), note="apply-chat-template is off")


def _rows(source: Source, key: str, place: str, path: str) -> Iterator[Outcome]:
    """Yield a file with the rows that slime takes of it: `file@[10:100]` is a part."""
    name, sign, part = path.partition("@[")
    start, _, end = part.rstrip("]").partition(":")
    if not sign or (start in ("", "0") and end.isdigit()):
        yield Outcome("converted", (key,), f"{place}.files", [name], "a list")
    else:
        yield asked(
            f"{place}.files",
            f"slime takes the rows {part.rstrip(']')} of {name}; write them to a file of their own",
            key,
        )
    if sign and end.isdigit():
        yield Outcome("converted", (key,), f"{place}.limit", int(end), "the first rows")


def _longest(place: str, tokens: int | None, key: str) -> Iterator[Outcome]:
    """Yield the limit of prompts. slime leaves longer ones out; without a limit it cuts none."""
    if tokens is None:
        note = "prompts have no limit there: one above max_prompt_tokens is an error here, and is not cut"
        yield Outcome("converted", (key,), f"{place}.on_long_prompt", "error", note)
        return
    note = "" if key == f"{key.partition('-')[0]}-max-prompt-len" else "one token is left for the response"
    yield Outcome("converted" if note else "same", (key,), f"{place}.max_prompt_tokens", tokens, note)
    yield Outcome("converted", (key,), f"{place}.on_long_prompt", "drop", "longer ones are left out")


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
    elif source[steps] is None:
        yield from _batch_of_megatron(source)
    elif prompts is not None and prompts % source[steps] == 0:
        per_step = prompts // source[steps]
        yield became(
            source, "batch.mini_batch_prompts", per_step, steps, note=f"{prompts} prompts / {source[steps]} steps"
        )
    elif prompts is not None:
        yield asked(
            "batch.mini_batch_prompts", f"{prompts} prompts do not divide into {source[steps]} gradient steps", steps
        )
    if source[size] is not None and source.gives(steps):
        yield Outcome("meaningless", (steps,), note="global-batch-size says it")
    yield own_way("batch.shuffle", False, "slime trains in the order of the prompts")
    yield from _tokens(source)


def _batch_of_megatron(source: Source) -> Iterator[Outcome]:
    """Yield the gradient steps of a script that says none: Megatron takes one micro-batch per data-parallel rank."""
    key, group = "micro-batch-size", source["n-samples-per-prompt"]
    ranks = source["actor-num-nodes"] * source["actor-num-gpus-per-node"]
    for axis in ("tensor", "pipeline", "context"):
        parallel = "context-parallel-size" if axis == "context" else f"{axis}-model-parallel-size"
        ranks //= source[parallel]
    samples = source[key] * ranks
    note = f"neither global-batch-size nor num-steps-per-rollout: {source[key]} × {ranks} data-parallel ranks = {samples} samples"
    if samples % group == 0:
        yield Outcome("converted", (key,), "batch.mini_batch_prompts", samples // group, f"{note} / {group} per prompt")
    else:
        yield asked("batch.mini_batch_prompts", f"{note}, no whole number of groups of {group}", key)


def _tokens(source: Source) -> Iterator[Outcome]:
    ranks, budget = source["context-parallel-size"], source["max-tokens-per-gpu"]
    response = source["rollout-max-response-len"]
    if response is None:
        return
    whole = source["rollout-max-context-len"]
    longest = (source["rollout-max-prompt-len"] or (whole - 1 if whole else _OUR_LONGEST_PROMPT)) + response
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
    yield from _warmup(source)
    if kind == "cosine":
        yield became(source, "optimizer.min_lr", source["min-lr"], "min-lr")
        used, steps = _decay(source)
        if steps is None:
            yield asked("optimizer.decay_updates", "the cosine lasts as long as the run, in gradient steps", key)
        else:
            note = "" if used == "lr-decay-iters" else "all gradient steps of the run"
            yield became(source, "optimizer.decay_updates", steps, used, note=note)
    if source["optimizer"] != "adam":
        yield gone(f"the optimizer {source['optimizer']}; nearest: AdamW", "optimizer")
    if source["optimizer-cpu-offload"]:
        part = source["optimizer-offload-fraction"]
        part = 1.0 if part is None else part
        yield Outcome(
            "converted", ("optimizer-cpu-offload",), "optimizer.offload_fraction", part, "the state on the host"
        )


def sequence_parallel(source: Source) -> Iterator[Outcome]:
    """Yield sequence parallelism, which Megatron turns off without tensor parallelism."""
    key = "sequence-parallel"
    if source[key] and source["tensor-model-parallel-size"] > 1:
        yield became(source, "parallel.sequence_parallel", True, key)
    elif source.gives(key):
        yield Outcome("meaningless", (key,), note="it is off with tensor-model-parallel-size 1")


def _fp8(source: Source) -> Iterator[Outcome]:
    """Yield training in FP8. Megatron's own recipe is `delayed`, which is refused here."""
    shape, recipe = source["fp8-format"], source["fp8-recipe"] or "delayed"
    if shape is None:
        return
    yield became(source, "model.fp8.format", shape, "fp8-format")
    if recipe == "delayed":
        yield asked(
            "model.fp8.recipe",
            "scales of earlier steps (delayed) are refused here: auto, blockwise or tensorwise",
            "fp8-format",
        )
    else:
        yield became(source, "model.fp8.recipe", recipe, "fp8-recipe")


def _warmup(source: Source) -> Iterator[Outcome]:
    share = source["lr-warmup-fraction"]
    if share is None:
        yield became(source, "optimizer.warmup_updates", source["lr-warmup-iters"], "lr-warmup-iters")
        return
    _, steps = _decay(source)
    if steps is None:
        yield asked("optimizer.warmup_updates", f"{share} of the run's gradient steps", "lr-warmup-fraction")
    else:
        note = f"{share} × {steps} gradient steps"
        yield became(source, "optimizer.warmup_updates", round(share * steps), "lr-warmup-fraction", note=note)


def _decay(source: Source) -> tuple[str, int | None]:
    """Return the gradient steps of the decay and the flag they come from; None if the flags do not say how long the run is."""
    if source["lr-decay-iters"] is not None:
        return "lr-decay-iters", source["lr-decay-iters"]
    rollouts, prompts, size = source["num-rollout"], source["rollout-batch-size"], source["global-batch-size"]
    samples = (prompts or 0) * source["n-samples-per-prompt"]
    if rollouts is None or not samples or not (size or source["num-steps-per-rollout"]):
        return "num-rollout", None
    return "num-rollout", rollouts * samples // (size or samples // source["num-steps-per-rollout"])


def model(source: Source) -> Iterator[Outcome]:
    """Yield the model, its dtype and what is recomputed."""
    path = source.path("hf-checkpoint")
    if path and re.search(r"fp8|int4|awq|gptq", str(path).rpartition("/")[2].lower()):
        note = f"{path} looks quantized: slime's servers load it, while training starts from ref-load. Name the folder with bf16 weights, and set rollout.sglang.quantize fp8 for servers in FP8"
        yield asked("model.path", note, "hf-checkpoint")
    elif path:
        yield became(source, "model.path", path, "hf-checkpoint")
    else:
        yield asked("model.path", "no hf-checkpoint", "hf-checkpoint")
    yield from _fp8(source)
    yield own_way("model.dtype", "bf16", "computes in bf16 with fp32 copies of the weights")
    level, modules = source["recompute-granularity"], source["recompute-modules"]
    used = source.below_flag("recompute-") or ["recompute-granularity"]
    named = [modules] if isinstance(modules, str) else modules
    recompute: Any = named if level == "selective" and named else level or "none"
    yield Outcome("converted", tuple(used), "model.recompute", recompute, "full: every layer by itself")


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
    pairs = list(zip(listed[::2], listed[1::2], strict=False)) if len(listed) > 1 else [("aime", listed[0])]
    for name, path in pairs:
        yield from _set(source, f"eval.sets.{re.sub(r'[^A-Za-z0-9_-]', '_', str(name))}", str(path))
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
    yield from _rows(source, "eval-prompt-data", place, path)
    yield from _longest(
        place,
        source["eval-max-prompt-len"],
        "eval-max-prompt-len" if source["eval-max-prompt-len"] else "eval-prompt-data",
    )
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
    yield from _template_kwargs(source, place)
    yield own_way(f"{place}.deduplicate", False, "slime keeps repeated rows")


def saving(source: Source) -> Iterator[Outcome]:
    """Yield checkpoints: slime keeps all of them."""
    if source.path("save") is not None:
        yield became(
            source, "output_dir", str(source.path("save")).rstrip("/"), "save", note="the run is in output_dir/name"
        )
    every = source["save-interval"]
    yield became(source, "checkpoint.every", every, "save-interval")
    if source["async-save"]:
        yield became(source, "checkpoint.async_save", True, "async-save")
    if every is not None:
        yield Outcome("converted", ("save-interval",), "checkpoint.keep", None, "slime keeps all")
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
