"""Rules of verl's table about the run: its length, model, batches, checkpoints and loggers.

Change here: how settings of verl that together say one thing become ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from dapo_mcore.foreign.table import Outcome, Source, asked, became, gone
from dapo_mcore.foreign.tables.verl_defaults import is_fully_async, is_megatron

_ACTOR, _ROLLOUT, _MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.model"
_MEGATRON = f"{_ACTOR}.megatron"
_FILTER = "algorithm.filter_groups"
NO_LIMIT = 1_000_000
"""As good as none: the most that a count may be."""


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
    """Yield the length of the run in steps where it is given. verl's loop over epochs may end before (ray_trainer.py, fit)."""
    key, epochs = "trainer.total_training_steps", "trainer.total_epochs"
    if is_fully_async(source.run):
        yield from _prompts_in_all(source)
    elif source[key] is None:
        return
    elif source.gives(epochs) and source.is_known(epochs):
        note = f"verl ends after {source[epochs]} epochs if they come first: if so, num_epochs={source[epochs]} instead"
        yield became(source, "num_rollout_steps", source[key], key, epochs, note=note)
    else:
        yield became(source, "num_rollout_steps", source[key], key)


def _prompts_in_all(source: Source) -> Iterator[Outcome]:
    """Yield the question of the length of a run that counts single prompts (fully_async_rollouter.py)."""
    key, epochs = "rollout.total_rollout_steps", "trainer.total_epochs"
    if source[key] is not None:
        note = (
            f"verl ends after {source[key]} prompts, or after {source[epochs]} epochs if they come first: that many prompts / "
            f"sampling.train_batch_prompts, or num_epochs={source[epochs]} instead"
        )
        yield asked("num_rollout_steps", note, key, epochs, "rollout.total_epochs")


def epochs(source: Source) -> Iterator[Outcome]:
    """Yield the length of the run in epochs, unless verl stops at total_training_steps. One of the two is asked for, never both."""
    steps, epochs = "trainer.total_training_steps", "trainer.total_epochs"
    if is_fully_async(source.run):
        steps = "rollout.total_rollout_steps"
    if not source.is_known(steps) or source[steps] is not None:
        return
    if source["algorithm.filter_groups.enable"]:
        yield asked(
            "num_epochs",
            f"num_epochs={source[epochs]} generates every row as often as verl, but how many steps that gives depends on how many "
            "groups are filtered out; or set num_rollout_steps instead",
            epochs,
        )
    else:
        note = "verl leaves out the rows of each epoch that fill no batch; here every prompt counts once"
        yield became(source, "num_epochs", source[epochs], epochs, note=note)


def model_path(source: Source) -> Iterator[Outcome]:
    """Yield the model."""
    path = f"{_MODEL}.path"
    if source.path(path):
        yield became(source, "model.path", source.path(path), path)
    else:
        yield asked("model.path", "the script names no model that could be read", path)


def trust(source: Source) -> Iterator[Outcome]:
    """Yield whether code of the model's folder is run: verl has a switch for the model and one for the tokenizer."""
    keys = [key for key in (f"{_MODEL}.trust_remote_code", "data.trust_remote_code") if source.gives(key)]
    if keys:
        on = [key for key in keys if source[key]]
        yield became(source, "model.trust_remote_code", bool(on), *(on or keys))


def dtype(source: Source) -> Iterator[Outcome]:
    """Yield the dtype of training. verl's FSDP keeps the weights in model_dtype, fp32 by default, and computes in dtype."""
    fsdp, megatron = f"{_ACTOR}.fsdp_config", f"{_MEGATRON}.dtype"
    names = (megatron,) if is_megatron(source.run) else (f"{fsdp}.mixed_precision.param_dtype", f"{fsdp}.dtype")
    key = next((name for name in names if source[name] is not None), names[-1])
    servers = f"{_ROLLOUT}.dtype"
    for place in (key, servers):
        if source[place] in ("float16", "fp16", "half"):
            yield gone(f"fp16{' of the servers' if place == servers else ''}; nearest: model.dtype bf16", place)
    stored = f"{fsdp}.model_dtype"
    shown = key if source.gives(key) else source.first(stored, f"{_ACTOR}.strategy", servers)
    if source[key] in ("float32", "fp32", "float"):
        yield Outcome("converted", (shown,), "model.dtype", "fp32", "computes in fp32")
    elif source[stored] in ("bf16", "bfloat16", "fp16", "float16") and not is_megatron(source.run):
        note = "computes in bf16 with fp32 copies of the weights; verl keeps them in half precision alone, which rounds small updates away"
        yield Outcome("converted", (stored,), "model.dtype", "bf16", note)
    else:
        note = "computes in bf16 with fp32 copies of the weights, as verl does"
        yield Outcome("converted", (shown,), "model.dtype", "bf16", note)


def recompute(source: Source) -> Iterator[Outcome]:
    """Yield what FSDP recomputes; Megatron's fields of it are in its TransformerConfig."""
    checkpointing = f"{_MODEL}.enable_gradient_checkpointing"
    if not is_megatron(source.run):
        recompute = "full" if source[checkpointing] else "none"
        yield became(source, "model.recompute", recompute, checkpointing, note="the inputs of layers are kept")
    elif source.gives(checkpointing):
        yield Outcome("meaningless", (checkpointing,), note="of FSDP; override_transformer_config holds for Megatron")


def replay(source: Source) -> Iterator[Outcome]:
    """Yield how experts are chosen again in training: R2 takes the routes of scoring, R3 those of the engine."""
    key = f"{_ACTOR}.router_replay.mode"
    if source[key] == "R2":
        yield became(source, "model.routing_replay", "scoring", key, note="the routes of the scoring pass")
    elif source[key] not in (None, "disabled"):
        yield gone("the engine's routes are not replayed; nearest: model.routing_replay scoring", key)


def config_json(source: Source) -> Iterator[Outcome]:
    """Yield overrides of config.json."""
    for place in (f"{_MODEL}.override_config", f"{_MODEL}.override_config.model_config"):
        whole_mapping = source[place] if isinstance(source[place], dict) else {}
        for key, value in {**whole_mapping, **source.below(place)}.items():
            whole = f"{place}.{key}" if source.gives(f"{place}.{key}") else place
            if key.startswith("moe_config"):
                yield from _moe_config(key, value, whole)
            elif key == "attn_implementation":
                yield Outcome("meaningless", (whole,), note="attention comes from Megatron")
            elif not key.startswith("model_config"):
                yield Outcome("same", (whole,), "model.overrides", _nested(key, value))


def _moe_config(key: str, value: Any, whole: str) -> Iterator[Outcome]:
    if value in (False, None, {}, {"freeze_moe_router": False}):
        yield Outcome("meaningless", (whole,), note="off, as here")
    else:
        yield gone(f"{key}: routers train with the other weights", whole, objective=True)


def packing(source: Source) -> Iterator[Outcome]:
    """Yield whether sequences are packed. Each backend of verl has a switch of its own, on by default."""
    key = f"{_MEGATRON}.use_remove_padding" if is_megatron(source.run) else f"{_MODEL}.use_remove_padding"
    yield became(source, "batch.packing", source[key] is not False, key)


def train_batch(source: Source) -> Iterator[Outcome]:
    """Yield the prompts of a rollout step. Programs that train while they generate set 0."""
    key, ours = _step(source), "sampling.train_batch_prompts"
    if source[key] <= 0:
        yield asked(ours, _no_steps(source), key)
    elif key == "data.train_batch_size":
        yield became(source, ours, source[key], key)
    else:
        note = f"verl trains on all that it generates, not on train_batch_size {source['data.train_batch_size']}, where nothing is filtered"
        yield became(source, ours, source[key], key, "data.train_batch_size", note=note)


def _no_steps(source: Source) -> str:
    """Return what a rollout step may be where the script's program has none: fully_async_trainer.py hands weights over at times."""
    note = "the script's program has no rollout steps of a fixed size"
    if not is_fully_async(source.run):
        return note
    parts = [source[f"async_training.{name}"] for name in ("trigger_parameter_sync_step", "require_batches")]
    parts.append(source[f"{_ACTOR}.ppo_mini_batch_size"])
    return f"{note}; it hands weights over after {' × '.join(map(str, parts))} = {math.prod(parts)} prompts"


def _step(source: Source) -> str:
    """Return the key of a rollout step's prompts: gen_batch_size where it is given and nothing is filtered."""
    train, gen = "data.train_batch_size", "data.gen_batch_size"
    if source[f"{_FILTER}.enable"] or not source[gen] or source[gen] == source[train] or source[train] <= 0:
        return train
    return gen


def mini_batch(source: Source) -> Iterator[Outcome]:
    """Yield the prompts of a gradient step, which must divide those of a rollout step."""
    key, ours = f"{_ACTOR}.ppo_mini_batch_size", "batch.mini_batch_prompts"
    size, whole = source[key], source[_step(source)]
    if size > whole > 0:
        yield became(source, ours, whole, key, note=f"the rollout step has only {whole} prompts")
    elif whole % size:
        note = f"{size} does not divide the {whole} prompts of a rollout step, and here all gradient steps are alike"
        yield asked(ours, note, key)
    else:
        yield became(source, ours, size, key)


def filtering(source: Source) -> Iterator[Outcome]:
    """Yield dynamic sampling. Off unless the recipe's switch is on; main_ppo of b178a3c does not read the switch."""
    train, gen, switch = "data.train_batch_size", "data.gen_batch_size", f"{_FILTER}.enable"
    on = bool(source[switch])
    if on and source.run.entry.endswith("main_ppo") and "dapo" not in source.run.entry:
        note = "filter as the script says, or none as verl does: its main_ppo reads no filter_groups at b178a3c, only main_dapo does"
        yield asked("sampling.style", note, switch)
    else:
        yield became(source, "sampling.style", "filter" if on else "none", switch)
    if not on:
        return
    size = gen if source[gen] else train
    yield became(source, "sampling.gen_batch_prompts", source[size], size, note="prompts")
    most = f"{_FILTER}.max_num_gen_batches"
    limit = source[most] if source[most] and source[most] > 0 else NO_LIMIT
    yield became(source, "sampling.max_gen_batches", limit, most, note="" if limit == source[most] else "no limit")
    yield Outcome("converted", (switch,), "sampling.carry_surplus", False, "verl throws surplus groups away")
    yield from _filter_metric(source)


def _filter_metric(source: Source) -> Iterator[Outcome]:
    """Yield the loss of a number by which groups are filtered, unless it makes the groups that acc makes."""
    key = f"{_FILTER}.metric"
    metric = source[key]
    if metric in ("seq_reward", "seq_final_reward") and _reward_is_right_or_wrong(source):
        yield Outcome("meaningless", (key,), note="the reward is right or wrong alone: the groups are those of acc")
    elif metric not in (None, "acc"):
        yield gone(f"groups are filtered by acc here, not by {metric}", key, objective=True)
    elif metric == "acc":
        yield Outcome("meaningless", (key,), note="as here")


def _reward_is_right_or_wrong(source: Source) -> bool:
    """Return True if equal rewards are equal accuracies: no function of the user's, no overlong penalty, no KL."""
    given = {setting.key for setting in source.run.settings if setting.value not in (None, False)}
    return not source["algorithm.use_kl_in_reward"] and not any(
        key.endswith("custom_reward_function.path") or ("overlong_buffer" in key and key.endswith(".enable"))
        for key in given
    )


def shuffle(source: Source) -> Iterator[Outcome]:
    """Yield whether mini-batches are drawn at random. FSDP's old workers, verl's default, cut them in order whatever is set."""
    key = f"{_ACTOR}.shuffle"
    in_order = not is_megatron(source.run) and source["trainer.use_legacy_worker_impl"] != "disable"
    note = "verl's old FSDP workers take mini-batches in order whatever is set" if source[key] and in_order else ""
    yield became(source, "batch.shuffle", bool(source[key]) and not in_order, key, note=note)


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


def checkpoints(source: Source) -> Iterator[Outcome]:
    """Yield how often checkpoints are saved, how many stay, and where a run resumes."""
    every, keep, last_alone = (
        "trainer.save_freq",
        "trainer.max_actor_ckpt_to_keep",
        "trainer.remove_previous_ckpt_in_save",
    )
    if source[every] and source[every] > 0:
        yield became(source, "checkpoint.every", source[every], every)
        if source[last_alone]:
            yield became(source, "checkpoint.keep", 1, last_alone, note="the newest alone")
        else:
            yield became(
                source, "checkpoint.keep", source[keep] or None, keep, note="" if source[keep] else "verl keeps all"
            )
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


def profile(source: Source) -> Iterator[Outcome]:
    """Yield the rollout steps that are profiled, if a tool is named."""
    for tool, steps in (
        ("global_profiler.tool", "global_profiler.steps"),
        ("trainer.profile_steps", "trainer.profile_steps"),
    ):
        if source[tool] and source[steps]:
            yield became(
                source, "observe.profile_steps", list(source[steps]), steps, note="rank 0 alone, with torch.profiler"
            )


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value
