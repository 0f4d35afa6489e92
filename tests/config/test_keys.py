"""Dotted keys: the type of the value under one, and the key that an unknown one may stand for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dapo_mcore.config.data import DataConfig, EvalSetConfig, WarmStartConfig
from dapo_mcore.config.file import load_config
from dapo_mcore.config.keys import (
    OLD_KEYS,
    is_prose,
    is_text,
    keys_of,
    kind_of,
    nearest_keys,
    nearest_section,
    type_below,
    type_of_items,
)
from dapo_mcore.config.schema import Config
from dapo_mcore.config.values import FilePaths
from dapo_mcore.errors import ConfigError


def test_a_key_leads_to_the_type_of_its_value() -> None:
    assert type_below(Config, "seed") == kind_of(["seed"])
    assert kind_of(["eval", "sets", "any_name"]) is EvalSetConfig
    assert type_below(WarmStartConfig | None, "choose") == DataConfig | None
    assert type_below(dict[str, int], "any_name") is int
    assert type_below(list[int], "0") is int and type_below(list[int], "first") is None
    assert kind_of(["tools", "3", "workers"]) == int | None
    assert kind_of(["megatron", "any_name", "below"]) is Any
    assert kind_of(["algo", "no_such_key"]) is kind_of(["seed", "below_a_value"]) is None


def test_the_keys_of_a_section_are_its_fields_in_order() -> None:
    assert keys_of(["algo", "kl"]) == ["coef", "estimator", "place"]
    assert keys_of(["warm_start"])[:2] == ["files", "batch_size"]  # a section that may be null
    assert keys_of(["eval", "sets"]) == keys_of(["seed"]) == keys_of(["nowhere"]) == []


def test_types_that_hold_text_prose_or_a_list() -> None:
    kinds = {
        key: kind_of(key.split(".")) for key in ("name", "seed", "algo.tis.mode", "data.system_prompt", "data.files")
    }
    assert [key for key, kind in kinds.items() if is_text(kind)] == ["name", "algo.tis.mode", "data.system_prompt"]
    assert [key for key, kind in kinds.items() if is_prose(kind)] == ["data.system_prompt"]
    assert not is_text(kind_of(["data", "chat_template"]))  # true and false are values of it, too
    assert type_of_items(FilePaths) == type_below(Config, "output_dir")
    assert type_of_items(int) is None


def test_the_nearest_section_is_looked_for_beside_the_unknown_one() -> None:
    assert nearest_section(["sampler"]) == ["sampling"]
    assert nearest_section(["algo", "kls"]) == ["algo.kl"]
    assert nearest_section(["zzz"]) == nearest_section(["s" * 65]) == []


def test_a_name_that_means_something_else_in_every_section_is_not_guessed() -> None:
    assert nearest_keys(["nowhere", "path"]) == []
    assert nearest_keys(["nowhere", "group_size"]) == ["rollout.group_size"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algo.clip_hi=0.3", "unknown key 'algo.clip_hi'; did you mean 'algo.clip_high'?"),
        ("rollout.grup_size=4", "unknown key 'rollout.grup_size'; did you mean 'rollout.group_size'?"),
        ("algo.kl.coeff=0.1", "unknown key 'algo.kl.coeff'; did you mean 'algo.kl.coef'?"),
        ("sampler.style=none", "unknown key 'sampler'; did you mean 'sampling'?"),
        ("group_size=4", "unknown key 'group_size'; did you mean 'rollout.group_size'?"),
        ("algo.kl_coef=0.1", "unknown key 'algo.kl_coef'; did you mean 'algo.kl.coef'?"),
        ("temperature=1", "unknown key 'temperature'; did you mean 'rollout.temperature' or 'eval.temperature'?"),
        ("checkpoint.save_every=1", "unknown key 'checkpoint.save_every'; did you mean 'checkpoint.every'?"),
        (
            "trainer.save_freq=1",
            "unknown key 'trainer.save_freq': this is verl's name for checkpoint.every (rollout steps; -1: null)",
        ),
        ("algorithm.lam=1", "unknown key 'algorithm.lam': this is verl's name for algo.lam (only with advantage gae)"),
        (
            "++data.train_batch_size=1",
            "this is verl's name for sampling.train_batch_prompts (prompts per rollout step)",
        ),
        (
            "trainer.tset_freq=1",
            "unknown key 'trainer.tset_freq'; did you mean trainer.test_freq, verl's name for eval.every (rollout steps;",
        ),
        ("data.train_files=a", "unknown key 'data.train_files': this is verl's name for data.files (a list of files)"),
        ("algo.adv_estimator=grpo", "did you mean 'algo.advantage'? (grpo is group here)"),
        ("algo.advantage=grpo", "set group or gae (grpo is group here)"),
        ("algo.kl.estimator=low_var_kl", "set k1, k2 or k3 (low_var_kl is k3 here)"),
        (
            "optimizer.warmup_rollout_steps=0.05",
            "or null; for 0.05 of the run, multiply it by the run's length in this unit",
        ),
        ("sampling.ppo_mini_batch_size=1", "did you mean 'batch.mini_batch_prompts'?"),
        ("max_response_length=1", "unknown key 'max_response_length'; did you mean 'rollout.max_response_tokens'?"),
        (
            "tensor_parallel_size=2",
            "did you mean 'parallel.tensor_parallel' or 'rollout.sglang.tensor_parallel'?",
        ),
        ("eval.sets.aime.group_size=1", "unknown key 'eval.sets.aime.group_size'; did you mean 'rollout.group_size'?"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(file, [override])


@pytest.mark.parametrize("old", OLD_KEYS)
def test_an_old_key_names_the_new_one_and_its_section(file: Path, old: str) -> None:
    new = OLD_KEYS[old]
    *section, key = new.split(".")
    assert key in keys_of(section)
    with pytest.raises(ConfigError) as error:
        load_config(file, [f"{old}=x"])
    assert (
        str(error.value) == f"{old} is now {new}: set {key} in the section {'.'.join(section)} and delete the old key"
    )


def test_each_key_of_an_unknown_section_is_named(file: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(
            file, ["actor_rollout_ref={rollout: {n: 8, top_k: 3}, actor: {optim: {clip_grad: 1}}}", "sampler={}"]
        )
    assert str(error.value).splitlines() == [
        "unknown key 'actor_rollout_ref.rollout.n': this is verl's name for rollout.group_size (responses per prompt)",
        "unknown key 'actor_rollout_ref.rollout.top_k': this is verl's name for rollout.top_k (-1: all tokens)",
        "unknown key 'actor_rollout_ref.actor.optim.clip_grad': this is verl's name for optimizer.clip_grad",
        "unknown key 'sampler'; did you mean 'sampling'?",
    ]
