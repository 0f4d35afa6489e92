"""verl's table as a whole: its keys are ours, each name of the list is in a rule, and a rule sets what the list says."""

from __future__ import annotations

from fnmatch import fnmatchcase

from dapo_mcore.config.foreign_names import VERL as NAMES
from dapo_mcore.config.keys import kind_of
from dapo_mcore.foreign.tables.verl import VERL
from tests.foreign.verl_runs import A, imported

STILL_TO_COME = {
    "num_epochs", "data.chat_template_kwargs", "algo.kl_cov", "algo.clip_cov", "algo.rejection", "reward.kwargs", "eval.top_k",
    "optimizer.warmup_rollout_steps", "optimizer.decay_rollout_steps", "critic.optimizer.warmup_rollout_steps",
    "observe.eval_samples_per_set", "observe.mlflow_experiment", "observe.swanlab_project", "algo.adaptive_entropy",
}  # fmt: skip


def test_every_key_that_a_rule_sets_is_ours() -> None:
    ours = {key for rule in VERL.rules for key in rule.ours}
    assert sorted(key for key in ours - STILL_TO_COME if kind_of(key.split(".")) is None) == []


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
    conversion = imported({"algorithm.adv_estimator": "grpo", **settings})
    assert {key: conversion.kind_of(key) for key in settings} == dict.fromkeys(settings, "meaningless")
