"""Rules of verl's table about the run: its length, model, batches, optimizer, critic, checkpoints and loggers.

Change here: how settings of verl that together say one thing become ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from dapo_mcore.foreign.table import Outcome, Source, asked, became, gone
from dapo_mcore.foreign.tables.verl_defaults import is_megatron

_ACTOR, _ROLLOUT, _MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.model"
_MEGATRON, _OPTIM = f"{_ACTOR}.megatron", f"{_ACTOR}.optim"
NO_LIMIT = 1_000_000
"""As good as none: the most that a count may be."""
_RECOMPUTE = ("recompute_granularity", "recompute_modules", "recompute_method", "recompute_num_layers")
_TAKEN_FOR_GRANTED = {"attention_backend": "flash", "moe_permute_fusion": False}


def name(source: Source) -> Iterator[Outcome]:
    """Yield the run's name in letters that a folder's name may have."""
    key, text = "trainer.experiment_name", str(source["trainer.experiment_name"])
    clean = re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip("-._")[:128] or "run"
    yield became(source, "name", clean, key, note="" if clean == text else "letters that a folder's name may have")


def folder(source: Source) -> Iterator[Outcome]:
    """Yield output_dir, which our run's name is appended to."""
    key = "trainer.default_local_dir"
    path = source.path(key)
    if not path:
        return
    parent, _, last = str(path).rstrip("/").rpartition("/")
    ends_with_name = last == source["trainer.experiment_name"]
    yield became(
        source, "output_dir", parent if ends_with_name and parent else path, key, note="the run is in output_dir/name"
    )


def steps(source: Source) -> Iterator[Outcome]:
    """Yield the length of the run in steps, where verl stops if it is given."""
    key = "trainer.total_training_steps"
    if source[key] is not None:
        yield became(source, "num_rollout_steps", source[key], key)


def epochs(source: Source) -> Iterator[Outcome]:
    """Yield the length of the run in epochs, unless verl stops at total_training_steps. One of the two is asked for, never both."""
    steps, epochs = "trainer.total_training_steps", "trainer.total_epochs"
    if not source.is_known(steps) or source[steps] is not None:
        if source.gives(epochs):
            yield Outcome("meaningless", (epochs,), note="total_training_steps ends the run")
    elif source["algorithm.filter_groups.enable"]:
        yield asked(
            "num_epochs",
            f"num_epochs={source[epochs]} generates every row as often as verl, but how many steps that gives depends on how many "
            "groups are filtered out; or set num_rollout_steps instead",
            epochs,
        )
    else:
        yield became(source, "num_epochs", source[epochs], epochs)


def model(source: Source) -> Iterator[Outcome]:
    """Yield the model, its dtype and what is recomputed."""
    path = f"{_MODEL}.path"
    yield (
        became(source, "model.path", source.path(path) or "", path)
        if source.path(path)
        else asked("model.path", "the script names no model", path)
    )
    half = [
        key
        for key in (f"{_ACTOR}.fsdp_config.dtype", f"{_MEGATRON}.dtype", f"{_ROLLOUT}.dtype")
        if _is_half(source[key])
    ]
    if half:
        yield gone("fp16 training; nearest: model.dtype bf16", half[0])
    key = source.first(
        f"{_ACTOR}.strategy", f"{_ACTOR}.fsdp_config.model_dtype", f"{_ACTOR}.fsdp_config.dtype", f"{_ROLLOUT}.dtype"
    )
    yield Outcome(
        "converted", (key,), "model.dtype", "bf16", "computes in bf16 with fp32 copies of the weights, as verl does"
    )
    checkpointing = f"{_MODEL}.enable_gradient_checkpointing"
    if not is_megatron(source.run):
        recompute = "full" if source[checkpointing] else "none"
        yield became(source, "model.recompute", recompute, checkpointing, note="the inputs of layers are kept")
    elif source.gives(checkpointing):
        yield Outcome("meaningless", (checkpointing,), note="of FSDP; override_transformer_config holds for Megatron")
    replay = f"{_ACTOR}.router_replay.mode"
    if source[replay] == "R2":
        yield became(source, "model.routing_replay", "scoring", replay, note="the routes of the scoring pass")
    elif source[replay] not in (None, "disabled"):
        yield gone("the engine's routes are not replayed; nearest: model.routing_replay scoring", replay)


def _is_half(dtype: Any) -> bool:
    return dtype in ("float16", "fp16", "half")


def config_json(source: Source) -> Iterator[Outcome]:
    """Yield overrides of config.json."""
    for place in (f"{_MODEL}.override_config", f"{_MODEL}.override_config.model_config"):
        whole_mapping = source[place] if isinstance(source[place], dict) else {}
        for key, value in {**whole_mapping, **source.below(place)}.items():
            whole = f"{place}.{key}" if source.gives(f"{place}.{key}") else place
            if key.startswith(("model_config", "moe_config")):
                continue
            if key == "attn_implementation":
                yield Outcome("meaningless", (whole,), note="attention comes from Megatron")
            else:
                yield Outcome("same", (whole,), "model.overrides", _nested(key, value))


def transformer_config(source: Source) -> Iterator[Outcome]:
    """Yield fields of Megatron's TransformerConfig, and what they say about recomputing."""
    place = f"{_MEGATRON}.override_transformer_config"
    given = source.below(place)
    for key, value in given.items():
        if key in _TAKEN_FOR_GRANTED and value == _TAKEN_FOR_GRANTED[key]:
            yield Outcome("meaningless", (f"{place}.{key}",), note="the default here, too")
        elif key not in _RECOMPUTE:
            yield Outcome("converted", (f"{place}.{key}",), "megatron", _nested(key, value), "Megatron's field")
    level = given.get("recompute_granularity")
    if level is not None:
        modules = given.get("recompute_modules")
        whole = ("moe_act", "shared_experts") if "moe" in (modules or ()) else ()
        recompute = [name for name in modules if name not in whole] if level == "selective" and modules else level
        used = tuple(f"{place}.{key}" for key in _RECOMPUTE if key in given)
        yield Outcome("converted", used, "model.recompute", recompute, "full: every layer by itself")


def packing(source: Source) -> Iterator[Outcome]:
    """Yield whether sequences are packed. Each backend of verl has a switch of its own, on by default."""
    key = f"{_MEGATRON}.use_remove_padding" if is_megatron(source.run) else f"{_MODEL}.use_remove_padding"
    yield became(source, "batch.packing", source[key] is not False, key)


def train_batch(source: Source) -> Iterator[Outcome]:
    """Yield the prompts of a rollout step. Programs that train while they generate set 0."""
    key, ours = "data.train_batch_size", "sampling.train_batch_prompts"
    if source[key] > 0:
        yield became(source, ours, source[key], key)
    else:
        yield asked(ours, "the script's program has no rollout steps of a fixed size", key)


def mini_batch(source: Source) -> Iterator[Outcome]:
    """Yield the prompts of a gradient step, which must divide those of a rollout step."""
    key, ours = f"{_ACTOR}.ppo_mini_batch_size", "batch.mini_batch_prompts"
    size, whole = source[key], source["data.train_batch_size"]
    if size > whole > 0:
        yield became(source, ours, whole, key, note=f"the rollout step has only {whole} prompts")
    elif whole % size:
        yield asked(
            ours,
            f"{size} does not divide the {whole} prompts of a rollout step, and here all gradient steps are alike",
            key,
        )
    else:
        yield became(source, ours, size, key)


def filtering(source: Source) -> Iterator[Outcome]:
    """Yield dynamic sampling. Off unless the recipe's switch is on."""
    place, train, gen = "algorithm.filter_groups", "data.train_batch_size", "data.gen_batch_size"
    on = bool(source[f"{place}.enable"])
    yield became(source, "sampling.style", "filter" if on else "none", f"{place}.enable")
    if not on:
        return
    yield became(
        source,
        "sampling.gen_batch_prompts",
        source[gen] or source[train],
        gen if source[gen] else train,
        note="prompts",
    )
    most = f"{place}.max_num_gen_batches"
    limit = source[most] if source[most] and source[most] > 0 else NO_LIMIT
    yield became(source, "sampling.max_gen_batches", limit, most, note="" if limit == source[most] else "no limit")
    yield Outcome("converted", (f"{place}.enable",), "sampling.carry_surplus", False, "verl throws surplus groups away")
    metric = source[f"{place}.metric"]
    if metric in ("seq_reward", "seq_final_reward") and _reward_is_right_or_wrong(source):
        yield Outcome(
            "meaningless", (f"{place}.metric",), note="the reward is right or wrong alone: the groups are those of acc"
        )
    elif metric not in (None, "acc"):
        yield gone(f"groups are filtered by acc here, not by {metric}", f"{place}.metric", objective=True)
    elif metric == "acc":
        yield Outcome("meaningless", (f"{place}.metric",), note="as here")


def _reward_is_right_or_wrong(source: Source) -> bool:
    """Return True if equal rewards are equal accuracies: no function of the user's, no overlong penalty, no KL."""
    given = {setting.key for setting in source.run.settings if setting.value not in (None, False)}
    return not source["algorithm.use_kl_in_reward"] and not any(
        key.endswith("custom_reward_function.path") or ("overlong_buffer" in key and key.endswith(".enable"))
        for key in given
    )


def batch_tokens(source: Source) -> Iterator[Outcome]:
    """Yield the tokens of a micro-batch on a rank: at least the longest sequence, as ours must be."""
    dynamic, budget, samples = (f"{_ACTOR}.use_dynamic_bsz", f"{_ACTOR}.ppo_max_token_len_per_gpu",
                                f"{_ACTOR}.ppo_micro_batch_size_per_gpu")  # fmt: skip
    cut = source[f"{_ROLLOUT}.response_length"] or source["data.max_response_length"]
    longest = source["data.max_prompt_length"] + cut
    ranks = source[f"{_MEGATRON}.context_parallel_size"] or 1
    if source[dynamic] or source[samples] is None:
        key, tokens, note = budget, source[budget], ""
    else:
        key, tokens = samples, -(-source[samples] * longest // ranks)
        note = f"{source[samples]} × {longest} tokens" + (f" / {ranks} ranks" if ranks > 1 else "")
    if tokens * ranks < longest:
        tokens, note = -(-longest // ranks), f"at least the longest sequence, {longest} tokens"
    yield became(source, "batch.max_tokens", tokens, key, note=note)
    other = samples if key == budget else budget
    if source.gives(other):
        yield Outcome("meaningless", (other,), note=f"use_dynamic_bsz is {'on' if key == budget else 'off'}")


def schedule(source: Source) -> Iterator[Outcome]:
    """Yield the learning rate's schedule. verl counts rollout steps: its scheduler steps once in each."""
    key = source.first(f"{_OPTIM}.lr_scheduler_type", f"{_OPTIM}.lr_decay_style", f"{_OPTIM}.warmup_style")
    kind = source[key] or source[f"{_OPTIM}.lr_decay_style"] or "constant"
    if kind not in ("constant", "cosine"):
        yield gone(f"the schedule {kind}; nearest: cosine", key)
    yield became(source, "optimizer.schedule", "cosine" if kind == "cosine" else "constant", key)
    yield from warmup(source, _OPTIM, "optimizer")
    if kind != "cosine":
        return
    ratio, least = f"{_OPTIM}.min_lr_ratio", f"{_OPTIM}.min_lr"
    if source[least]:
        yield became(source, "optimizer.min_lr", source[least], least)
    elif source[ratio]:
        lr = source[f"{_OPTIM}.lr"]
        yield Outcome("converted", (ratio,), "optimizer.min_lr", source[ratio] * lr, f"{source[ratio]} × lr {lr}")
    steps = f"{_OPTIM}.lr_decay_steps" if source[f"{_OPTIM}.lr_decay_steps"] else "trainer.total_training_steps"
    if source[steps] is None:
        yield asked("optimizer.decay_rollout_steps", "the cosine lasts as long as the run, in rollout steps", key)
    else:
        yield Outcome("converted", (steps,), "optimizer.decay_rollout_steps", source[steps], "the cosine's length")


def warmup(source: Source, place: str, ours: str) -> Iterator[Outcome]:
    """Yield the warm-up in rollout steps of the optimizer at `place`: verl's steps, or its ratio of all steps."""
    key, ratio = f"{place}.lr_warmup_steps", f"{place}.lr_warmup_steps_ratio"
    steps, part = source[key], source[ratio] or 0
    ours = f"{ours}.warmup_rollout_steps"
    if steps is not None and steps >= 0:
        yield became(source, ours, steps, key, note="rollout steps, as verl's scheduler counts" if steps else "")
    elif not part:
        yield Outcome("converted", (key,), ours, 0, "none")
    elif source["trainer.total_training_steps"] is None:
        yield asked(ours, f"{part:g} of all rollout steps, whose number the script does not say", ratio)
    else:
        steps = int(part * source["trainer.total_training_steps"])
        yield Outcome(
            "converted", (ratio,), ours, steps, f"{part:g} of {source['trainer.total_training_steps']} rollout steps"
        )


def optimizer_memory(source: Source) -> Iterator[Outcome]:
    """Yield the fraction of the optimizer's state that is on the host."""
    place = f"{_OPTIM}.override_optimizer_config"
    offload, fraction = f"{place}.optimizer_cpu_offload", f"{place}.optimizer_offload_fraction"
    if source[offload]:
        value = 1.0 if source[fraction] is None else float(source[fraction])
        yield Outcome("converted", (offload, fraction), "optimizer.offload_fraction", value, "of the state")


def betas(source: Source) -> Iterator[Outcome]:
    """Yield Adam's two betas."""
    key = f"{_OPTIM}.betas"
    for number, beta in enumerate(source[key], 1):
        yield Outcome("same", (key,), f"optimizer.beta{number}", beta)


def critic(source: Source) -> Iterator[Outcome]:
    """Yield the critic's settings, which hold only with the estimator gae."""
    if not source.is_known("algorithm.adv_estimator"):
        return
    if source["algorithm.adv_estimator"] != "gae":
        for setting in source.run.settings:
            if setting.key.startswith("critic.") or setting.key == "trainer.critic_warmup":
                yield Outcome("meaningless", (setting.key,), note="there is no critic without the estimator gae")
        return
    for key, ours in {"critic.optim.lr": "critic.optimizer.lr", "critic.optim.weight_decay": "critic.optimizer.weight_decay",
                      "critic.cliprange_value": "critic.clip", "trainer.critic_warmup": "critic.warmup_steps"}.items():  # fmt: skip
        yield became(source, ours, source[key], key)
    yield from warmup(source, "critic.optim", "critic.optimizer")
    path = "critic.model.path"
    if source.gives(path) and source.path(path) != source.path(f"{_MODEL}.path"):
        yield gone(
            "the critic starts from the policy's weights with a value head of 0, not from another model",
            path,
            objective=True,
        )
    for name in ("ppo_epochs", "ppo_mini_batch_size", "loss_agg_mode", "shuffle", "grad_clip"):
        if source.gives(key := f"critic.{name}") and source[key] != source[f"{_ACTOR}.{name}"]:
            yield gone(f"the critic trains with the policy's {name}, {source[f'{_ACTOR}.{name}']}", key, objective=True)
    for setting in source.run.settings:
        if setting.key.startswith("critic.") and setting.key not in (
            path,
            "critic.optim.lr",
            "critic.optim.weight_decay",
        ):
            yield Outcome("meaningless", (setting.key,), note="the critic has the policy's layout and batches")


def checkpoints(source: Source) -> Iterator[Outcome]:
    """Yield how often checkpoints are saved, how many stay, and where a run resumes."""
    every, keep = "trainer.save_freq", "trainer.max_actor_ckpt_to_keep"
    if source[every] and source[every] > 0:
        yield became(source, "checkpoint.every", source[every], every)
        limit = source[keep] or NO_LIMIT
        yield became(source, "checkpoint.keep", limit, keep, note="" if source[keep] else "verl keeps all")
    elif source.gives(every):
        yield Outcome("converted", (every,), "checkpoint.every", None, "never; one is saved at the end and at a signal")
    mode, path = "trainer.resume_mode", "trainer.resume_from_path"
    if source[mode] == "resume_path":
        yield gone("checkpoints of verl are not read; nearest: its Hugging Face export as model.path", path)
    else:
        resume = "never" if source[mode] == "disable" else "auto"
        yield became(source, "checkpoint.resume", resume, mode, note="" if source[mode] == resume else "start anew")


def samples(source: Source) -> Iterator[Outcome]:
    """Yield how many samples are kept: verl writes all of them where a folder is named."""
    folders = {"trainer.rollout_data_dir": ("observe.samples_per_step", NO_LIMIT),
               "trainer.validation_data_dir": ("observe.eval_samples_per_set", None)}  # fmt: skip
    if source[count := "trainer.log_val_generations"]:
        value = source[count] if source[count] > 0 else None
        yield became(source, "observe.eval_samples_per_set", value, count, note="" if value else "all")
    for key, (ours, every) in folders.items():
        setting = source.setting(key)
        if setting is not None and setting.value is not None:
            yield Outcome("converted", (key,), ours, every, "all, in samples/ of the run's folder")


def loggers(source: Source) -> Iterator[Outcome]:
    """Yield the loggers, each with the project's name."""
    key, project = "trainer.logger", "trainer.project_name"
    names = source[key] if isinstance(source[key], list) else [source[key]]
    ours = {
        "wandb": "observe.wandb_project",
        "mlflow": "observe.mlflow_experiment",
        "swanlab": "observe.swanlab_project",
    }
    for name in names:
        if name in ours and not source.is_known(project):
            yield asked(ours[name], "the script takes the project's name from outside", project)
        elif name in ours:
            yield Outcome("converted", (project, key), ours[name], str(source[project]), f"{name} is among the loggers")
        elif name == "tensorboard":
            yield Outcome("converted", (key,), "observe.tensorboard", True, "on here by default")
        elif name not in ("console", "file", None):
            yield gone(f"no logger {name}; nearest: tensorboard, wandb, mlflow, swanlab and metrics.jsonl", key)


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value
