"""Rules of NeMo-RL's table about the run: its length, model, layout, data, batches, optimizer, servers, checkpoints and loggers.

Change here: how keys of NeMo-RL that together say one thing become ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dapo_mcore.foreign.table import Outcome, Source, asked, became, gone, own_way
from dapo_mcore.foreign.tables.nemo_data import is_evaluated

_GENERATION, _MEGATRON = "policy.generation", "policy.megatron_cfg"
_STEPS_WITHOUT_END = 1_000_000


def length(source: Source) -> Iterator[Outcome]:
    """Yield the length of the run: there, whichever of steps and epochs ends first."""
    steps, epochs = "grpo.max_num_steps", "grpo.max_num_epochs"
    if source[steps] >= _STEPS_WITHOUT_END:
        yield became(source, "num_epochs", source[epochs], epochs)
    else:
        note = f"NeMo-RL ends after {source[steps]} steps or {source[epochs]} epochs, whichever is first; here one of them is set"
        yield asked("num_rollout_steps", note, steps, epochs)


def model(source: Source) -> Iterator[Outcome]:
    """Yield the model, its dtype and what is recomputed."""
    yield became(source, "model.path", source.path("policy.model_name"), "policy.model_name")
    dtypes = {"bfloat16": "bf16", "float32": "fp32"}
    if source["policy.precision"] in dtypes:
        yield became(source, "model.dtype", dtypes[source["policy.precision"]], "policy.precision", note="our word")
    else:
        yield gone(f"precision {source['policy.precision']}; nearest: bfloat16", "policy.precision")
    place = _MEGATRON if source[f"{_MEGATRON}.enabled"] else "policy.dtensor_cfg"
    key, level = f"{place}.activation_checkpointing", f"{_MEGATRON}.recompute_granularity"
    if source[key] and place == _MEGATRON and source[level] == "selective":
        modules = source[f"{_MEGATRON}.recompute_modules"] or "selective"
        yield became(source, "model.recompute", modules, level, note="parts of layers")
    else:
        yield became(source, "model.recompute", "full" if source[key] else "none", key, note="every layer by itself")
    yield from _megatron_model(source)


def _megatron_model(source: Source) -> Iterator[Outcome]:
    """Yield what Megatron's model has beside the weights: FP8, and routers of experts, which NeMo-RL freezes by default."""
    if not source[f"{_MEGATRON}.enabled"]:
        return
    if source[f"{_MEGATRON}.fp8_cfg.enabled"]:
        recipe, shape = f"{_MEGATRON}.fp8_cfg.fp8_recipe", f"{_MEGATRON}.fp8_cfg.fp8"
        yield became(source, "model.fp8.recipe", source[recipe] or "auto", recipe)
        if source[shape]:
            yield became(source, "model.fp8.format", source[shape], shape)
    frozen = f"{_MEGATRON}.freeze_moe_router"
    named = any(".moe_" in key for key in source.below_flag(f"{_MEGATRON}.moe_"))
    if source[frozen] and (source.gives(frozen) or named or source[f"{_MEGATRON}.expert_model_parallel_size"] > 1):
        yield gone("routers train, too, if the model has experts", frozen)
    kind, rate = f"{_MEGATRON}.moe_router_load_balancing_type", f"{_MEGATRON}.moe_router_bias_update_rate"
    if source[kind] not in (None, "none"):
        yield gone(f"{source[kind]} balances the experts there; nearest: model.moe_aux_loss_coef", kind, objective=True)
    if source[rate]:
        yield gone("the bias of routers stays as it is", rate, objective=True)


def overrides(source: Source) -> Iterator[Outcome]:
    """Yield overrides of config.json."""
    for key, value in source.below("policy.hf_config_overrides").items():
        yield Outcome("same", (f"policy.hf_config_overrides.{key}",), "model.overrides", _nested(key, value))


def _nested(key: str, value: Any) -> dict[str, Any]:
    head, dot, rest = key.partition(".")
    return {head: _nested(rest, value) if dot else value}


DTENSOR = tuple(
    f"policy.dtensor_cfg.{name}"
    for name in ("enabled", "tensor_parallel_size", "context_parallel_size", "expert_parallel_size")
)
"""The keys of another layout than Megatron's."""


def layout(source: Source) -> Iterator[Outcome]:
    """Yield the layout of Megatron. That of DTensor (FSDP) is for a person to decide."""
    if source[f"{_MEGATRON}.enabled"]:
        for key, ours in {"tensor_model": "tensor", "pipeline_model": "pipeline", "context": "context", "expert_model": "expert",
                          "expert_tensor": "expert_tensor"}.items():  # fmt: skip
            name = f"{_MEGATRON}.{key}_parallel_size"
            yield became(source, f"parallel.{ours}_parallel", source[name], name)
        key = f"{_MEGATRON}.sequence_parallel"
        on = bool(source[key]) and source[f"{_MEGATRON}.tensor_model_parallel_size"] > 1
        yield became(source, "parallel.sequence_parallel", on, key)
        return
    used = tuple(key for key in DTENSOR if source.gives(key)) or DTENSOR[:1]
    note = (
        "DTensor (FSDP) has another layout than Megatron needs. Once all is answered, with 1 for now, `dapo-mcore plan FILE "
        "--suggest` ranks those that fit"
    )
    yield asked("parallel.tensor_parallel", note, *used)


def sampling(source: Source) -> Iterator[Outcome]:
    """Yield dynamic sampling."""
    switch, prompts, times = "grpo.use_dynamic_sampling", "grpo.num_prompts_per_step", "grpo.batch_multiplier"
    yield became(source, "sampling.train_batch_prompts", source[prompts], prompts)
    on = bool(source[switch])
    yield became(
        source, "sampling.style", "filter" if on else "none", switch, note="by whether acc varies" if on else "off"
    )
    if on:
        yield from _single_drops(source)
        note = f"{source[times]} × {source[prompts]} prompts"
        yield became(source, "sampling.gen_batch_prompts", int(source[times] * source[prompts]), times, note=note)
        most = "grpo.dynamic_sampling_max_gen_batches"
        yield became(source, "sampling.max_gen_batches", source[most], most)
        yield Outcome("converted", (switch,), "sampling.carry_surplus", False, "NeMo-RL throws surplus groups away")


def _single_drops(source: Source) -> Iterator[Outcome]:
    """Yield the loss of a filter by the std of the other responses: it drops single responses."""
    mean = "grpo.use_leave_one_out_baseline"
    if source[mean]:
        what = "with a leave-one-out baseline NeMo-RL drops single responses whose others are alike; here whole groups are kept or dropped"
        yield gone(what, mean, objective=True)


def batch(source: Source) -> Iterator[Outcome]:
    """Yield gradient steps and micro-batches. NeMo-RL counts samples."""
    size, group = "policy.train_global_batch_size", source["grpo.num_generations_per_prompt"]
    if source[size] % group == 0:
        yield became(
            source,
            "batch.mini_batch_prompts",
            source[size] // group,
            size,
            note=f"{source[size]} samples / {group} per prompt",
        )
    else:
        yield asked(
            "batch.mini_batch_prompts", f"{source[size]} samples are no whole number of groups of {group}", size
        )
    yield own_way("batch.shuffle", False, "NeMo-RL trains in the order of the prompts")
    yield from _tokens(source)


def _tokens(source: Source) -> Iterator[Outcome]:
    """Yield the tokens of a micro-batch: those of packing or dynamic batching where the run says them, else those of its samples."""
    samples, whole = "policy.train_micro_batch_size", "policy.max_total_sequence_length"
    ranks = (source[f"{_MEGATRON}.context_parallel_size"] or 1) if source[f"{_MEGATRON}.enabled"] else 1
    for place in ("policy.sequence_packing", "policy.dynamic_batching"):
        key = f"{place}.train_mb_tokens"
        if source[f"{place}.enabled"] and source.gives(key):
            yield became(
                source, "batch.max_tokens", -(-max(source[key], source[whole]) // ranks), key, note=f"/ {ranks} ranks"
            )
            return
    note = f"{source[samples]} × {source[whole]} tokens / {ranks} ranks"
    yield became(source, "batch.max_tokens", -(-source[samples] * source[whole] // ranks), samples, whole, note=note)


def optimizer(source: Source) -> Iterator[Outcome]:
    """Yield the optimizer and its schedule, of Megatron or of DTensor, whichever is on. Schedules count rollout steps."""
    megatron = bool(source[f"{_MEGATRON}.enabled"])
    place = f"{_MEGATRON}.optimizer" if megatron else "policy.optimizer.kwargs"
    yield became(source, "optimizer.lr", source[f"{place}.lr"], f"{place}.lr")
    yield became(source, "optimizer.weight_decay", source[f"{place}.weight_decay"], f"{place}.weight_decay")
    eps = f"{place}.adam_eps" if megatron else f"{place}.eps"
    yield became(source, "optimizer.eps", source[eps] or 1e-8, eps)
    yield from _clipping(source, megatron)
    if megatron:
        share = f"{place}.optimizer_cpu_offload"
        if source[share]:
            yield became(
                source,
                "optimizer.offload_fraction",
                source[f"{place}.optimizer_offload_fraction"] or 0.0,
                share,
                note="its fraction",
            )
        yield became(source, "optimizer.beta1", source[f"{place}.adam_beta1"], f"{place}.adam_beta1")
        yield became(source, "optimizer.beta2", source[f"{place}.adam_beta2"], f"{place}.adam_beta2")
        yield from _megatron_schedule(source)
        return
    beta1, beta2 = source[f"{place}.betas"]
    yield Outcome("converted", (f"{place}.betas",), "optimizer.beta1", beta1, "the first of two")
    yield Outcome("converted", (f"{place}.betas",), "optimizer.beta2", beta2, "the second of two")
    yield from _torch_schedule(source)


def _clipping(source: Source, megatron: bool) -> Iterator[Outcome]:
    own, shared = f"{_MEGATRON}.optimizer.clip_grad", "policy.max_grad_norm"
    key = own if megatron and source.gives(own) else shared
    if source[key] is None and megatron:
        yield Outcome("converted", (own,), "optimizer.clip_grad", 1.0, "Megatron's default")
    else:
        yield became(source, "optimizer.clip_grad", source[key] or 0.0, key, note="" if source[key] else "no clipping")


def _megatron_schedule(source: Source) -> Iterator[Outcome]:
    place = f"{_MEGATRON}.scheduler"
    kind, key = source[f"{place}.lr_decay_style"], f"{place}.lr_decay_style"
    if kind not in ("constant", "cosine"):
        yield gone(f"the schedule {kind}; nearest: cosine", key)
    yield became(source, "optimizer.schedule", "cosine" if kind == "cosine" else "constant", key)
    steps, first = source[f"{place}.lr_warmup_iters"], source[f"{place}.lr_warmup_init"]
    note = f"from {first} there, from 0 here" if steps and first else ""
    yield became(source, "optimizer.warmup_rollout_steps", steps, f"{place}.lr_warmup_iters", note=note)
    if kind == "cosine":
        yield became(
            source, "optimizer.decay_rollout_steps", source[f"{place}.lr_decay_iters"], f"{place}.lr_decay_iters"
        )
        yield became(
            source, "optimizer.min_lr", source[f"{_MEGATRON}.optimizer.min_lr"], f"{_MEGATRON}.optimizer.min_lr"
        )


def _torch_schedule(source: Source) -> Iterator[Outcome]:
    """Yield the schedule of a list of torch's schedulers: a linear warm-up, then constant or cosine."""
    key = "policy.scheduler"
    if source.below(key):
        yield gone(
            "a single scheduler; nearest: optimizer.schedule with optimizer.warmup_rollout_steps",
            *(f"{key}.{name}" for name in source.below(key)),
        )
        return
    parts = [part for part in source[key] or [] if isinstance(part, dict) and "name" in part]
    at = next((part["milestones"] for part in source[key] or [] if isinstance(part, dict) and "milestones" in part), [])
    names = [str(part["name"]).rpartition(".")[2] for part in parts]
    first, last = (dict(part.get("kwargs") or {}) for part in (parts[0], parts[-1])) if parts else ({}, {})
    steps = first.get("total_iters", 0) if names[:1] == ["LinearLR"] else 0
    if not _is_known(names, first, last) or (len(names) > 1 and at and at != [steps]):
        yield gone(f"the schedule {', '.join(names)}; nearest: optimizer.schedule cosine with warm-up", key)
        return
    start = f"from {first.get('start_factor', 1 / 3):g} × lr there, from 0 here; " if steps else ""
    if names[-1:] == ["CosineAnnealingLR"]:
        yield became(source, "optimizer.schedule", "cosine", key)
        yield became(source, "optimizer.decay_rollout_steps", steps + last["T_max"], key, note="with the warm-up")
        yield became(source, "optimizer.min_lr", last.get("eta_min", 0.0), key, note="eta_min")
    then = "cosine" if names[-1:] == ["CosineAnnealingLR"] else "constant"
    yield became(
        source, "optimizer.warmup_rollout_steps", steps, key, note=f"{start}{steps} rollout steps, then {then}"
    )


def _is_known(names: list[str], first: dict[str, Any], last: dict[str, Any]) -> bool:
    """Return True for a warm-up to the learning rate, a constant at it, or a cosine with or without a warm-up."""
    if names[:1] == ["LinearLR"] and first.get("end_factor", 1.0) != 1:
        return False
    if names[-1:] == ["ConstantLR"] and last.get("factor", 1 / 3) != 1:
        return False
    tails = (
        [],
        ["LinearLR"],
        ["ConstantLR"],
        ["LinearLR", "ConstantLR"],
        ["CosineAnnealingLR"],
        ["LinearLR", "CosineAnnealingLR"],
    )
    return names in tails and (names[-1:] != ["CosineAnnealingLR"] or "T_max" in last)


def saving(source: Source) -> Iterator[Outcome]:
    """Yield checkpoints: NeMo-RL keeps the best by a metric."""
    place = "checkpointing"
    yield became(
        source,
        "output_dir",
        source.path(f"{place}.checkpoint_dir"),
        f"{place}.checkpoint_dir",
        note="the run is in output_dir/name",
    )
    if not source[f"{place}.enabled"]:
        yield became(source, "checkpoint.every", None, f"{place}.enabled", note="off")
        return
    yield became(source, "checkpoint.every", source[f"{place}.save_period"], f"{place}.save_period")
    best, metric = f"{place}.keep_top_k", f"{place}.metric_name"
    if source[best] is None:
        yield became(source, "checkpoint.keep", None, best)
    elif source[metric] is not None:
        yield became(source, "checkpoint.keep_best", source[best], best)
        yield from _best(source, metric)
        if not source[f"{place}.higher_is_better"]:
            yield became(source, "checkpoint.best_mode", "min", f"{place}.higher_is_better", note="lower is better")


def _best(source: Source, metric: str) -> Iterator[Outcome]:
    """Yield our name of the metric: NeMo-RL's accuracy is the mean reward of a validation, ours the share of right answers."""
    samples = source["grpo.val_num_generations_per_prompt"] * (source["data.validation.repeat"] or 1)
    if source[metric] == "val:accuracy" and is_evaluated(source):
        yield became(source, "checkpoint.best_metric", f"val/validation/mean@{samples}", metric, note="our name")
    else:
        note = f"our name of {source[metric]}, such as val/validation/mean@{samples}: metrics.jsonl has all names"
        yield asked("checkpoint.best_metric", note, metric)


def loggers(source: Source) -> Iterator[Outcome]:
    """Yield the loggers."""
    yield became(
        source, "observe.tensorboard", bool(source["logger.tensorboard_enabled"]), "logger.tensorboard_enabled"
    )
    for name, key, ours in (("wandb", "project", "wandb_project"), ("mlflow", "experiment_name", "mlflow_experiment"),
                            ("swanlab", "project", "swanlab_project")):  # fmt: skip
        whole = f"logger.{name}.{key}"
        if source[f"logger.{name}_enabled"]:
            yield became(source, f"observe.{ours}", source[whole], whole)
            if source.gives(f"logger.{name}_enabled"):
                yield Outcome(
                    "converted", (f"logger.{name}_enabled",), f"observe.{ours}", source[whole], "the project's name"
                )
        elif source.gives(whole):
            yield Outcome("meaningless", (whole,), note=f"{name} is off")
