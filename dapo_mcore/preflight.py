"""Checks of a run before its processes connect: files, the model's folder, the parallel layout, the data.

Change here: what `dapo-mcore config` and a run's first process check. Each rule is defined in the module that needs it;
this module calls the rules early.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapo_mcore.checkpoint.choice import resumed_checkpoint
from dapo_mcore.config.data import DataConfig
from dapo_mcore.config.effect import doubtful, without_effect
from dapo_mcore.config.follows import describe_evaluation
from dapo_mcore.config.schema import Config
from dapo_mcore.data.rows import check_files
from dapo_mcore.errors import ConfigError, RewardError, ToolError
from dapo_mcore.hub import is_offline
from dapo_mcore.observe.sinks import check_wandb
from dapo_mcore.observe.trackers import check_trackers
from dapo_mcore.process.launcher import check_launcher
from dapo_mcore.reward.by_source import check_sources
from dapo_mcore.reward.plugins import Rule, build_judge

if TYPE_CHECKING:
    from dapo_mcore.types import Prompt

_MOST_ROWS = 1000


def check_run(config: Config, processes: int | None = None) -> None:
    """Raise the DapoError that a run with so many processes (None: as many as fit) would raise at its start.

    This imports transformers and torch, but not Megatron, and reads no weights and no rows.
    """
    check_files_of(config)
    _load_rewards(config, users=False)
    if config.observe.wandb_project:
        check_wandb()
    check_trackers(config.observe)
    _check_model(config, processes)
    _check_feeder(config)


def check_contents(config: Config, *, servers: bool = True) -> list[str]:
    """Return what a run prints about its data, for up to 1,000 prompts per set. Raise the DapoError it would raise.

    Check what a run reads at its start: rows, headers of weight files, the reward function, the options of this machine's
    SGLang, the tools, and the checkpoint that the run would resume from. servers  False leaves SGLang out.
    """
    from dapo_mcore.architecture.families import architecture_name
    from dapo_mcore.checkpoint.stored import check_stored
    from dapo_mcore.data.run_data import load_run_data
    from dapo_mcore.data.stops import read_stops
    from dapo_mcore.model_files.hf_config import check_tokenizer_fits, load_hf_config, load_tokenizer
    from dapo_mcore.rollout.agent.build import open_agent
    from dapo_mcore.rollout.sampling.length import check_length, describe_length

    hf_config, tokenizer = load_hf_config(config.model), load_tokenizer(config.model)
    check_tokenizer_fits(tokenizer, hf_config)
    stops = read_stops(config, tokenizer)
    told = [stops.told] if stops.told else []
    if config.model.init == "pretrained":
        told += _check_weights(config, hf_config)
    if config.reward.placement == "local":
        _load_rewards(config, users=True)
    if (checkpoint := resumed_checkpoint(config)) is not None:
        check_stored(checkpoint)
    most = _MOST_ROWS if config.num_epochs is None else None  # else the number of prompts is the run's length
    with closing(open_agent(config, tokenizer, stops)) as agent:
        data = load_run_data(
            config, hf_config, tokenizer, warm_start=checkpoint is None, most=most, tools=agent.schemas
        )
    sets = {found.section: found.prompts for found in data.prompt_sets}
    by_source = check_sources(config, sets)
    if config.reward.placement == "local":
        _try_rewards(config, sets)
    if servers and config.rollout.engine == "sglang":
        _check_servers(config, architecture_name(hf_config))
    incomplete = any(len(found.prompts) == most for found in data.prompt_sets)
    follows = describe_evaluation(config, {name: len(found.prompts) for name, found in data.evaluation.items()}, most)
    if config.num_epochs is not None:
        check_length(config, len(data.train.prompts))
        follows += describe_length(config, len(data.train.prompts))
    return (
        told
        + data.lines()
        + by_source
        + follows
        + ([f"only the first {_MOST_ROWS:,} prompts of a set were read here; a run reads all"] if incomplete else [])
    )


def _check_weights(config: Config, hf_config: Any) -> list[str]:
    """Check headers of weight files. Return a line if they are still on the hub, which only a run downloads; offline that is an error."""
    from dapo_mcore.model_files.hf_folder import open_stored
    from dapo_mcore.model_files.model_folder import has_weights, hub_name, model_folder

    folder = model_folder(config.model, weights=is_offline())
    if hub_name(config.model.path) and not has_weights(folder):
        return [
            f"model.path: the weights of {config.model.path} are not in the cache yet; the run downloads them first"
        ]
    open_stored(folder, hf_config)
    return []


def check_files_of(config: Config) -> None:
    """Raise a DapoError for named files that do not exist, and for contradictory variables of a launcher."""
    check_launcher(os.environ)
    for check in FILE_CHECKS:
        check(config)


def _check_model_folder(config: Config) -> None:
    if config.model.revision is not None or not Path(config.model.path, "config.json").is_file():
        from dapo_mcore.model_files.hf_config import load_hf_config

        load_hf_config(config.model)  # asks the hub, or raises an error that says what is wrong with the folder


def _check_data_files(config: Config) -> None:
    for name, section in _data_sections(config).items():
        check_files(section.files, name)
    if config.warm_start is not None and resumed_checkpoint(config) is None:
        check_files(config.warm_start.files, "warm_start")


def _check_other_files(config: Config) -> None:
    sglang = config.rollout.sglang
    for key, function in _reward_functions(config).items():
        file = function.rpartition(":")[0]
        if file.endswith(".py") and config.reward.placement == "local" and not Path(file).is_file():
            raise RewardError(f"{key} {function!r}: no file at {Path(file).absolute()}; correct the path")
    for tool in config.tools:
        file = tool.function.rpartition(":")[0]
        if file.endswith(".py") and tool.placement == "local" and not Path(file).is_file():
            raise ToolError(
                f"tools: {tool.name} has function {tool.function!r}, but there is no file {Path(file).absolute()}; correct the path"
            )
    if config.rollout.engine != "sglang":
        return
    if sglang.key_file is not None and not Path(sglang.key_file).is_file():
        raise ConfigError(
            f"rollout.sglang.key_file {sglang.key_file} is not a file; correct the path, or leave it null"
        )
    if sglang.python is not None and not sglang.urls and shutil.which(sglang.python) is None:
        raise ConfigError(
            f"rollout.sglang.python {sglang.python} is not a program; name the Python of the environment with SGLang"
        )


def _reward_functions(config: Config) -> dict[str, str]:
    """Return the reward functions that the configuration names, by their keys."""
    return {
        "reward.function": config.reward.function,
        **{f"reward.by_source.{pattern}": function for pattern, function in config.reward.by_source.items()},
        **{f"eval.sets.{name}.reward_function": function for name, function in config.set_functions.items()},
    }


FILE_CHECKS = (_check_model_folder, _check_data_files, _check_other_files)
"""Each raises the DapoError for the first file of its kind that does not exist."""


def describe_run(config: Config) -> list[str]:
    """Return what a run prints first: the size of a rollout step, the FP8 recipe and overrides of config.json if it has them, and
    settings that have no effect."""
    from dapo_mcore.actor.model.fp8_rules import describe_fp8

    lines = [describe_step(config), *([describe_fp8(config.model)] if config.model.fp8 else [])]
    lines += [_describe_overrides(config)] if config.model.overrides else []
    return [*lines, *doubtful(config), *without_effect(config)]


def _describe_overrides(config: Config) -> str:
    """Return one line about the keys of config.json that the run replaces, and what servers that it does not start need."""
    from dapo_mcore.model_files.hf_config import load_hf_config

    overrides = config.model.overrides
    stored = load_hf_config(config.model.model_copy(update={"overrides": {}}))
    changes = ", ".join(
        f"{key} {json.dumps(value)} (in config.json {json.dumps(getattr(stored, key, None))})"
        for key, value in overrides.items()
    )
    line = f"model.overrides: {changes}; for actor, servers and exports"
    if config.rollout.engine == "sglang" and config.rollout.sglang.urls:
        line += f". Servers at rollout.sglang.urls need --json-model-override-args '{json.dumps(overrides)}'"
    return line


def describe_step(config: Config) -> str:
    """Return one line about the size of a rollout step, with the settings that still have the paper's size by default."""
    s, size = config.sampling, config.rollout.group_size
    prompts = s.gen_batch_prompts if s.style == "filter" else s.train_batch_prompts
    line = (
        f"a rollout step generates {prompts:,} prompts × {size} = {prompts * size:,} responses of up to "
        f"{config.rollout.max_response_tokens:,} tokens{' at a time' if s.style == 'filter' else ''}, and trains on "
        f"{s.train_batch_prompts:,} × {size} in {config.updates_per_step:,} updates"
    )
    paper = [
        f"{section}.{key}"
        for section, keys in (
            ("sampling", ("gen_batch_prompts", "train_batch_prompts")),
            ("rollout", ("group_size", "max_response_tokens")),
        )
        for key in keys
        if key not in getattr(config, section).model_fields_set and (key != "gen_batch_prompts" or s.style == "filter")
    ]
    return (
        f"{line}; the paper's size by default, to be lowered for a smaller run: {', '.join(paper)}" if paper else line
    )


def _load_rewards(config: Config, *, users: bool) -> None:
    """Load the reward functions. users  also users' code, which a run executes only in its workers."""
    sets = {f"eval.sets.{name}.reward_function": config.set_reward(name) for name in config.set_functions}
    for key, section in {"reward.function": config.reward, **sets}.items():
        if users or not any(":" in function for function in section.functions):
            build_judge(Rule.of(section), key)


def _try_rewards(config: Config, sets: Mapping[str, Sequence[Prompt]]) -> None:
    """Try users' reward functions as a run does at its start, each in one process if they run in processes."""
    from dapo_mcore.reward.trial import build_tried_rewards

    functions = {*config.reward.functions, *config.set_functions.values()}
    if any(":" in function for function in functions):
        one = config.reward.model_copy(update={"workers": min(1, config.reward.num_workers)})
        reward, others = build_tried_rewards(config.model_copy(update={"reward": one}), sets)
        for scorer in (reward, *others.values()):
            scorer.close()


def _check_servers(config: Config, architecture: str) -> None:
    """Check the settings of SGLang servers against the model and, if this machine starts them, against its SGLang."""
    from dapo_mcore.rollout.sglang.launch.interpreter import command_line, inspect_environment
    from dapo_mcore.rollout.sglang.launch.servers import read_keys
    from dapo_mcore.rollout.sglang.sync.weight_format import check_architecture

    settings = config.rollout.sglang
    if settings.quantize == "fp8":
        check_architecture(architecture)
    if settings.urls:
        read_keys(settings.key_file)
    elif settings.placement == "local" or config.ray.address is None:
        found = inspect_environment(settings, continues_requests=config.sampling.on_full == "keep")
        command_line(settings.server_args, found.options)


def _check_model(config: Config, processes: int | None) -> None:
    from dapo_mcore.actor.model.expert_rules import check_routing
    from dapo_mcore.actor.model.fp8_rules import check_fp8
    from dapo_mcore.actor.model.megatron_fields import check_fields
    from dapo_mcore.actor.model.recompute import check_recompute
    from dapo_mcore.actor.parallel.mesh import (
        check_mesh,
        data_parallel_size,
        expert_data_parallel_size,
        fewest_processes,
    )
    from dapo_mcore.architecture.reader import read_architecture
    from dapo_mcore.model_files.hf_config import load_hf_config
    from dapo_mcore.rollout.sglang.launch.servers import check_heads, check_shared_gpus

    architecture = read_architecture(load_hf_config(config.model), config.longest_sequence)
    check_mesh(architecture, config.parallel)
    count = fewest_processes(config.parallel) if processes is None else processes
    data_parallel_size(config.parallel, count)
    expert_data_parallel_size(config.parallel, count)
    engine = config.model.transformer_impl != "local" and importlib.util.find_spec("transformer_engine") is not None
    check_fields(config.megatron, engine=engine)
    check_fp8(architecture, config.model, config.parallel, engine=engine)
    check_recompute(architecture, config.model, engine=engine)
    check_routing(architecture, config.model, config.megatron)
    if config.rollout.engine == "sglang":
        check_heads(config.rollout.sglang, architecture.fields["num_attention_heads"])
        if processes is not None:
            check_shared_gpus(config.rollout.sglang, processes)


def _check_feeder(config: Config) -> None:
    from dapo_mcore.batch.feeder import check_feeder

    check_feeder(config.batch.feeder)


def _data_sections(config: Config) -> dict[str, DataConfig]:
    sections = {"data": config.data, **{f"eval.sets.{name}": part for name, part in config.eval.sets.items()}}
    if config.warm_start is not None and config.warm_start.choose is not None and resumed_checkpoint(config) is None:
        sections["warm_start.choose"] = config.warm_start.choose
    return sections
