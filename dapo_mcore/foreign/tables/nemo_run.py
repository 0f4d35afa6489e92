"""Rules of NeMo-RL's table about the run: its length, model, layout, data, batches, optimizer, servers, checkpoints and loggers.

Change here: how keys of NeMo-RL that together say one thing become ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dapo_mcore.foreign.table import Outcome, Source, asked, became, gone

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
    key = f"{place}.activation_checkpointing"
    yield became(source, "model.recompute", "full" if source[key] else "none", key, note="every layer by itself")


def overrides(source: Source) -> Iterator[Outcome]:
    """Yield overrides of config.json."""
    for key, value in source.below("policy.hf_config_overrides").items():
        yield Outcome("same", (f"policy.hf_config_overrides.{key}",), "model.overrides", _nested(key, value))


def _nested(key: str, value: Any) -> dict[str, Any]:
    head, dot, rest = key.partition(".")
    return {head: _nested(rest, value) if dot else value}


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
    used = tuple(f"policy.dtensor_cfg.{key}" for key in source.below("policy.dtensor_cfg")) or (
        "policy.dtensor_cfg.enabled",
    )
    note = (
        "DTensor (FSDP) has another layout than Megatron needs. Once all is answered, with 1 for now, `dapo-mcore plan FILE "
        "--suggest` ranks those that fit"
    )
    yield asked("parallel.tensor_parallel", note, *used)


def lengths(source: Source) -> Iterator[Outcome]:
    """Yield the limits of prompts and responses: there, a limit of both together holds, too."""
    prompt, response, whole = (
        "data.max_input_seq_length",
        f"{_GENERATION}.max_new_tokens",
        "policy.max_total_sequence_length",
    )
    if source[prompt] is None or source[prompt] >= source[whole]:
        yield asked(
            "data.max_prompt_tokens",
            f"there prompts and responses share {source[whole]} tokens; here each has a limit",
            whole,
        )
        yield asked("rollout.max_response_tokens", f"the rest of {source[whole]} tokens", whole)
        return
    yield became(source, "data.max_prompt_tokens", source[prompt], prompt)
    yield Outcome("converted", (prompt,), "data.on_long_prompt", "drop", "longer ones are left out of the loss there")
    left = min(source[response], source[whole] - source[prompt])
    note = (
        "" if left == source[response] else f"what max_total_sequence_length {source[whole]} leaves the longest prompt"
    )
    yield became(source, "rollout.max_response_tokens", left, *((response, whole) if note else (response,)), note=note)


def data(source: Source) -> Iterator[Outcome]:
    """Yield the training data. NeMo-RL's named data sets are for a person to name as files."""
    path, name = "data.train.data_path", "data.train.dataset_name"
    several = [key for key in ("data.custom_dataloader", "data.train") if source.gives(key) and source[key]]
    if several:
        what = "a list of data sets" if several[0] == "data.train" else "a loader of the user's own"
        yield asked("data.files", f"the prompts come from {what}; name the files, mixed as they are to be", *several)
    elif source.path(path):
        yield Outcome("converted", (path,), "data.files", [source.path(path)], "a list")
        if source["data.train.input_key"]:
            yield became(source, "data.prompt_key", source["data.train.input_key"], "data.train.input_key")
        if source["data.train.output_key"]:
            yield became(source, "data.answer_key", source["data.train.output_key"], "data.train.output_key")
    else:
        note = f"NeMo-RL loads {source[name] or 'its own data set'} by name; name its files, or hf://org/name:split"
        yield asked("data.files", note, name if source.gives(name) else path)
    yield Outcome("converted", (path,), "data.chat_template", True, "NeMo-RL renders every prompt")
    yield Outcome("converted", (path,), "data.deduplicate", False, "NeMo-RL keeps repeated rows")
    frame = "data.default.prompt_file"
    if source[frame] is not None:
        yield gone(
            f"the text of {source[frame]} around each prompt; nearest: a chat template (data.chat_template)",
            frame,
            objective=True,
        )
    elif source.gives(frame):
        yield Outcome("meaningless", (frame,), note="no text around prompts, as here")


def evaluation(source: Source) -> Iterator[Outcome]:
    """Yield the evaluation set and when it is evaluated."""
    path, name, every = "data.validation.data_path", "data.validation.dataset_name", "grpo.val_period"
    if not (source[every] and source[every] > 0) or not (source.path(path) or source[name]):
        for key in (path, name, every, "grpo.max_val_samples"):
            if source.gives(key):
                yield Outcome("meaningless", (key,), note="nothing is evaluated")
        return
    yield became(source, "eval.every", source[every], every)
    yield became(source, "eval.at_start", bool(source["grpo.val_at_start"]), "grpo.val_at_start")
    if source.path(path):
        yield Outcome("converted", (path,), "eval.sets.validation.files", [source.path(path)], "a named set per file")
    else:
        yield asked(
            "eval.sets.validation.files",
            f"NeMo-RL loads {source[name]} by name; name its files, or hf://org/name:split",
            name,
        )
    yield Outcome(
        "converted", ("grpo.max_val_samples",), "eval.sets.validation.limit", source["grpo.max_val_samples"], "rows"
    )
    yield Outcome("converted", (name,), "eval.sets.validation.deduplicate", False, "NeMo-RL keeps repeated rows")
    yield Outcome("converted", (name,), "eval.sets.validation.chat_template", True, "NeMo-RL renders every prompt")
    yield became(
        source,
        "eval.samples_per_prompt",
        source["grpo.val_num_generations_per_prompt"],
        "grpo.val_num_generations_per_prompt",
    )
    for ours in ("temperature", "top_p", "top_k"):
        own, train = f"{_GENERATION}.val_{ours}", f"{_GENERATION}.{ours}"
        used = own if source.gives(own) else train
        value = source[used] if source[used] is not None else -1
        yield became(source, f"eval.{ours}", value, used, note="" if used == own else "as in training")


def sampling(source: Source) -> Iterator[Outcome]:
    """Yield dynamic sampling."""
    switch, prompts, times = "grpo.use_dynamic_sampling", "grpo.num_prompts_per_step", "grpo.batch_multiplier"
    yield became(source, "sampling.train_batch_prompts", source[prompts], prompts)
    on = bool(source[switch])
    yield became(
        source, "sampling.style", "filter" if on else "none", switch, note="by whether acc varies" if on else "off"
    )
    if on:
        note = f"{source[times]} × {source[prompts]} prompts"
        yield became(source, "sampling.gen_batch_prompts", int(source[times] * source[prompts]), times, note=note)
        most = "grpo.dynamic_sampling_max_gen_batches"
        yield became(source, "sampling.max_gen_batches", source[most], most)
        yield Outcome("converted", (switch,), "sampling.carry_surplus", False, "NeMo-RL throws surplus groups away")


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
    yield Outcome("converted", (size,), "batch.shuffle", False, "NeMo-RL trains in the order of generation")
    samples, whole = "policy.train_micro_batch_size", "policy.max_total_sequence_length"
    ranks = (source[f"{_MEGATRON}.context_parallel_size"] or 1) if source[f"{_MEGATRON}.enabled"] else 1
    note = f"{source[samples]} × {source[whole]} tokens / {ranks} ranks"
    yield became(source, "batch.max_tokens", -(-source[samples] * source[whole] // ranks), samples, whole, note=note)


def optimizer(source: Source) -> Iterator[Outcome]:
    """Yield the optimizer and its schedule, of Megatron or of DTensor, whichever is on. Schedules count rollout steps."""
    megatron = bool(source[f"{_MEGATRON}.enabled"])
    place = f"{_MEGATRON}.optimizer" if megatron else "policy.optimizer.kwargs"
    yield became(source, "optimizer.lr", source[f"{place}.lr"], f"{place}.lr")
    yield became(source, "optimizer.weight_decay", source[f"{place}.weight_decay"], f"{place}.weight_decay")
    if megatron:
        yield became(source, "optimizer.beta1", source[f"{place}.adam_beta1"], f"{place}.adam_beta1")
        yield became(source, "optimizer.beta2", source[f"{place}.adam_beta2"], f"{place}.adam_beta2")
        yield from _megatron_schedule(source)
        return
    beta1, beta2 = source[f"{place}.betas"]
    yield Outcome("converted", (f"{place}.betas",), "optimizer.beta1", beta1, "the first of two")
    yield Outcome("converted", (f"{place}.betas",), "optimizer.beta2", beta2, "the second of two")
    yield from _torch_schedule(source)


def _megatron_schedule(source: Source) -> Iterator[Outcome]:
    place = f"{_MEGATRON}.scheduler"
    kind, key = source[f"{place}.lr_decay_style"], f"{place}.lr_decay_style"
    if kind not in ("constant", "cosine"):
        yield gone(f"the schedule {kind}; nearest: cosine", key)
    yield became(source, "optimizer.schedule", "cosine" if kind == "cosine" else "constant", key)
    yield became(
        source, "optimizer.warmup_rollout_steps", source[f"{place}.lr_warmup_iters"], f"{place}.lr_warmup_iters"
    )
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
    parts = source[key] if source.gives(key) else []
    names = [
        str(part.get("name", "")).rpartition(".")[2] for part in parts if isinstance(part, dict) and "name" in part
    ]
    if not parts:
        yield became(
            source, "optimizer.warmup_rollout_steps", 50, key, note="LinearLR over 50 rollout steps, then constant"
        )
    elif names in (["LinearLR", "ConstantLR"], ["ConstantLR"], ["LinearLR"]):
        steps = parts[0]["kwargs"].get("total_iters", 0) if names[0] == "LinearLR" else 0
        yield became(
            source,
            "optimizer.warmup_rollout_steps",
            steps,
            key,
            note=f"LinearLR over {steps} rollout steps, then constant",
        )
    else:
        yield gone(f"the schedule {', '.join(names)}; nearest: optimizer.schedule cosine with warm-up", key)


def servers(source: Source) -> Iterator[Outcome]:
    """Yield the servers: vLLM's place is SGLang's here."""
    place, nodes, per_node = f"{_GENERATION}.vllm_cfg", "cluster.num_nodes", "cluster.gpus_per_node"
    size, gpus = source[f"{place}.tensor_parallel_size"], source[nodes] * source[per_node]
    yield Outcome(
        "converted",
        (f"{_GENERATION}.backend",),
        "rollout.engine",
        "sglang",
        "SGLang's servers: tune their options again",
    )
    yield became(source, "rollout.sglang.tensor_parallel", size, f"{place}.tensor_parallel_size")
    shared = bool(source[f"{_GENERATION}.colocated.enabled"])
    if shared and size <= source[per_node] and gpus % size == 0:
        used = (nodes, per_node, f"{place}.tensor_parallel_size")
        yield Outcome(
            "converted",
            used,
            "rollout.sglang.num_servers",
            gpus // size,
            f"{source[nodes]} × {source[per_node]} GPUs / {size}",
        )
    else:
        yield asked(
            "rollout.sglang.num_servers", f"of {gpus} GPUs, those that generate, in servers of {size}", nodes, per_node
        )
    key = f"{_GENERATION}.colocated.enabled"
    yield Outcome(
        "converted",
        (key,),
        "rollout.sglang.colocated",
        shared,
        "servers and training take turns on the GPUs" if shared else "apart",
    )
    yield Outcome(
        "converted", (key,), "rollout.sglang.sync", "tensor" if shared else "distributed", "how weights get there"
    )
    if source[nodes] > 1:
        yield Outcome("converted", (nodes,), "rollout.sglang.placement", "nodes", f"{source[nodes]} nodes")
        yield Outcome("converted", (nodes,), "rollout.sglang.host", "node", "each node's own address")
    memory, eager = f"{place}.gpu_memory_utilization", f"{place}.enforce_eager"
    note = "SGLang's name; chosen for vLLM: tune it again"
    yield Outcome("converted", (memory,), "rollout.sglang.server_args", {"mem-fraction-static": source[memory]}, note)
    if source[eager]:
        yield Outcome(
            "converted", (eager,), "rollout.sglang.server_args", {"disable-cuda-graph": True}, "SGLang's name"
        )
    elif source.gives(eager):
        yield Outcome("meaningless", (eager,), note="SGLang's default, too")


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
        yield became(source, "checkpoint.keep", _STEPS_WITHOUT_END, best, note="all")
    elif source[metric] is not None:
        yield became(source, "checkpoint.keep_best", source[best], best)
        yield asked(
            "checkpoint.best_metric",
            f"our name of {source[metric]}, such as eval/validation/mean: metrics.jsonl has all names",
            metric,
        )
        if not source[f"{place}.higher_is_better"]:
            yield became(source, "checkpoint.best_mode", "min", f"{place}.higher_is_better", note="lower is better")


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
