"""verl's table as a whole: its keys are ours, each name of the list is in a rule, and a rule sets what the list says."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from dapo_mcore.config.foreign_names import VERL as NAMES
from dapo_mcore.config.keys import kind_of
from dapo_mcore.foreign.convert import convert
from dapo_mcore.foreign.read.verl import read_verl
from dapo_mcore.foreign.tables.verl import VERL
from dapo_mcore.foreign.write import default_of
from tests.foreign.scripts import DAPO_32B
from tests.foreign.verl_runs import GRPO, A, imported


def test_every_key_that_a_rule_sets_is_ours() -> None:
    ours = {key for rule in VERL.rules for key in rule.ours}
    assert sorted(key for key in ours if kind_of(key.split(".")) is None) == []


def test_the_list_of_names_and_the_table_agree() -> None:
    """Messages about unknown keys come from the list, conversions from the table."""
    for key, name in NAMES.items():
        rules = [
            rule for rule in VERL.rules if rule.reads(key) or any(fnmatchcase(own, f"{key}.*") for own in rule.keys)
        ]
        assert rules, f"no rule reads {key}"
        ours = {ours for rule in rules for ours in rule.ours}
        parts = {".".join(one.split(".")[:depth]) for one in ours for depth in range(1, 5)}
        assert set(name.keys) & (ours | parts), f"{key}: the list says {name.ours}, the table {sorted(ours)}"


def test_settings_that_change_nothing() -> None:
    settings = {
        f"{A}.fsdp_config.param_offload": True, "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": 8,
        "trainer.balance_batch": True, "data.return_raw_chat": True, f"{A}.megatron.use_mbridge": True,
    }  # fmt: skip
    conversion = imported({**GRPO, **settings})
    assert {key: conversion.kind_of(key) for key in settings} == dict.fromkeys(settings, "meaningless")


def test_the_run_of_32b_by_hand(tmp_path: Path) -> None:
    """All that the script changes of our defaults, written down from the script and verl's defaults."""
    script = tmp_path / "run.sh"
    script.write_text(DAPO_32B, encoding="utf-8")
    conversion = convert(read_verl(script), VERL)
    found = {key: value for key, (value, _) in conversion.values().items() if value != default_of(key)}
    aime = {"files": ["~/verl/data/aime-2024.parquet"], "chat_template": True}
    assert found == {
        "name": "DAPO-Qwen2.5-32B",
        "output_dir": "~/verl/ckpts/DAPO",
        "model.path": "~/verl/models/Qwen2.5-32B",
        "model.dtype": "bf16",
        "model.recompute": "full",
        "data.files": ["~/verl/data/dapo-math-17k.parquet"],
        "data.chat_template": True,
        "data.deduplicate": False,
        "rollout.engine": "sglang",
        "rollout.sglang.tensor_parallel": 4,
        "rollout.sglang.num_servers": 16 * 8 // 4,
        "rollout.sglang.colocated": True,
        "rollout.sglang.sync": "tensor",
        "rollout.sglang.placement": "nodes",
        "rollout.sglang.host": "node",
        "rollout.sglang.server_args": {"mem-fraction-static": 0.8},
        "sampling.carry_surplus": False,
        "reward.function": "by_source",
        "reward.overlong.penalty": True,
        "algo.dual_clip": 10.0,
        "batch.shuffle": False,
        "optimizer.warmup_rollout_steps": 10,
        **{f"eval.sets.aime-2024.{key}": value for key, value in aime.items()},
        "eval.samples_per_prompt": 1,
        "eval.top_p": 0.7,
        "checkpoint.every": 5,
        "checkpoint.keep": None,
        "observe.wandb_project": "DAPO",
    }
    assert set(conversion.asked) == {"num_epochs", "parallel.tensor_parallel"}


def test_settings_that_change_the_result_are_never_meaningless() -> None:
    settings: dict[str, tuple[object, bool]] = {
        "actor_rollout_ref.ref.model.path": ("/other", True), "actor_rollout_ref.rollout.do_sample": (False, True),
        "actor_rollout_ref.rollout.ignore_eos": (True, True), "trainer.val_only": (True, True),
        "actor_rollout_ref.rollout.enable_rollout_routing_replay": (True, False), f"{A}.optim.num_cycles": (1.5, True),
        f"{A}.optim.optimizer": ("SGD", True), "data.custom_cls.path": ("d.py", True),
        "actor_rollout_ref.model.lora_adapter_path": ("/a", True), "data.image_key": ("images", True),
        "actor_rollout_ref.rollout.min_p": (0.1, True), "config-name": ("my_own", True), f"{A}.optim.lr_warmup_init": (1e-7, False),
    }  # fmt: skip
    conversion = imported({**GRPO, **{key: value for key, (value, _) in settings.items()}})
    assert conversion.losses == {key: objective for key, (_, objective) in settings.items()}
