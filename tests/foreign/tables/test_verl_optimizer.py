"""verl's optimizers and its critic in our words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dapo_mcore.foreign.convert import convert
from dapo_mcore.foreign.settings import ForeignRun, ForeignSetting
from dapo_mcore.foreign.tables.verl import VERL
from tests.foreign.verl_runs import GRPO, A, M, asked, imported, lost, ours

OPTIM = f"{A}.optim"
MEGATRON = {f"{A}.strategy": "megatron"}
GAE = {"algorithm.adv_estimator": "gae"}


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({f"{OPTIM}.lr_warmup_steps": 10}, 10),
        ({f"{OPTIM}.lr_warmup_steps": -1}, 0),
        ({f"{OPTIM}.lr_warmup_steps_ratio": 0.1, "trainer.total_training_steps": 250}, 25),
        ({}, 0),
        (
            {f"{OPTIM}.lr_warmup_steps": 0, f"{OPTIM}.lr_warmup_steps_ratio": 0.1, "trainer.total_training_steps": 250},
            0,
        ),
        (
            {
                **MEGATRON,
                f"{OPTIM}.lr_warmup_steps": 0,
                f"{OPTIM}.lr_warmup_steps_ratio": 0.1,
                "trainer.total_training_steps": 250,
            },
            25,
        ),
        (
            {
                **MEGATRON,
                f"{OPTIM}.lr_warmup_steps_ratio": 0.1,
                f"{OPTIM}.lr_decay_steps": 80,
                "trainer.total_training_steps": 250,
            },
            8,
        ),
    ],
)
def test_warm_up_is_in_rollout_steps(settings: dict[str, Any], steps: int) -> None:
    """FSDP's ratio holds below 0 steps and is of the run; Megatron's also at 0, and is of lr_decay_steps."""
    assert ours(settings)["optimizer.warmup_rollout_steps"] == steps


def test_a_ratio_of_an_unknown_length_is_asked_for() -> None:
    conversion = imported({**GRPO, f"{OPTIM}.lr_warmup_steps_ratio": 0.1, "trainer.total_epochs": 4})
    note = conversion.asked["optimizer.warmup_rollout_steps"].note
    assert note.startswith("0.1 × rows of the training files / 1024 × 4 epochs, in rollout steps; put 0 first")


def test_cosine_decays_over_the_run() -> None:
    settings = {
        f"{OPTIM}.lr_scheduler_type": "cosine", f"{OPTIM}.lr": 2e-6, f"{OPTIM}.min_lr_ratio": 0.1,
        "trainer.total_training_steps": 500,
    }  # fmt: skip
    found = ours(settings)
    assert (found["optimizer.schedule"], found["optimizer.decay_rollout_steps"]) == ("cosine", 500)
    assert found["optimizer.min_lr"] == pytest.approx(2e-7)
    assert "optimizer.decay_rollout_steps" in asked({f"{OPTIM}.warmup_style": "cosine"})
    assert lost({**MEGATRON, f"{OPTIM}.lr_decay_style": "WSD"}) == {f"{OPTIM}.lr_decay_style": False}


def test_each_backend_has_its_own_names_of_the_cosine() -> None:
    """FSDP has min_lr_ratio and the run's length, Megatron min_lr and lr_decay_steps; warmup_style replaces lr_scheduler_type."""
    length = {"trainer.total_training_steps": 500}
    megatron = {
        **MEGATRON,
        **length,
        f"{OPTIM}.lr_decay_style": "cosine",
        f"{OPTIM}.min_lr": 1e-7,
        f"{OPTIM}.lr_decay_steps": 300,
    }
    found = ours(megatron)
    assert (found["optimizer.min_lr"], found["optimizer.decay_rollout_steps"]) == (1e-7, 300)
    both = {**length, f"{OPTIM}.warmup_style": "cosine", f"{OPTIM}.lr_scheduler_type": "constant"}
    assert ours(both)["optimizer.schedule"] == "cosine"


def test_clipping_is_read_from_where_the_workers_read_it() -> None:
    """dp_actor.py reads actor.grad_clip, the engines and Megatron optim.clip_grad, which optim.grad_clip replaces."""
    both = {f"{A}.grad_clip": 0.5, f"{OPTIM}.clip_grad": 2.0}
    assert ours(both)["optimizer.clip_grad"] == 0.5
    assert ours({f"{OPTIM}.clip_grad": 2.0})["optimizer.clip_grad"] == 1.0
    assert ours({**both, **MEGATRON})["optimizer.clip_grad"] == 2.0
    assert ours({**both, "trainer.use_legacy_worker_impl": "disable"})["optimizer.clip_grad"] == 2.0
    assert ours({**both, **MEGATRON, f"{OPTIM}.grad_clip": 3.0})["optimizer.clip_grad"] == 3.0


def test_betas_hold_for_fsdp_alone() -> None:
    """init_megatron_optim_config passes no betas, so Megatron's 0.9 and 0.999 hold."""
    betas = {f"{OPTIM}.betas": [0.8, 0.98]}
    assert (ours(betas)["optimizer.beta1"], ours(betas)["optimizer.beta2"]) == (0.8, 0.98)
    assert "optimizer.beta2" not in ours({**betas, **MEGATRON})
    overrides = {
        f"{OPTIM}.override_optimizer_config.adam_beta2": 0.95,
        f"{OPTIM}.override_optimizer_config.adam_eps": 1e-6,
    }
    found = ours({**overrides, **MEGATRON})
    assert (found["optimizer.beta2"], found["optimizer.eps"]) == (0.95, 1e-6)
    assert ours({f"{OPTIM}.override_optimizer_config": {"betas": [0.9, 0.9]}})["optimizer.beta2"] == 0.9


def test_an_unknown_field_of_the_optimizer_is_lost() -> None:
    place = f"{OPTIM}.override_optimizer_config"
    assert lost({f"{place}.use_precision_aware_optimizer": True, f"{place}.optimizer_cpu_offload": False}) == {}
    assert lost({f"{place}.use_muon": True}) == {f"{place}.use_muon": True}


def test_a_critic_only_with_gae() -> None:
    """verl trains the policy from step critic_warmup on, so that 10 leave 9 steps to the critic alone."""
    settings = {"critic.optim.lr": 2e-6, "trainer.critic_warmup": 10, "critic.cliprange_value": 0.2}
    assert not any(key.startswith("critic.") for key in ours(settings))
    found = ours({"algorithm.adv_estimator": "gae", **settings})
    assert (found["critic.optimizer.lr"], found["critic.warmup_steps"], found["critic.clip"]) == (2e-6, 9, 0.2)
    other = {"algorithm.adv_estimator": "gae", f"{M}.path": "/m/a", "critic.model.path": "/m/b"}
    assert lost(other) == {"critic.model.path": True}


def test_the_optimizer_on_the_host() -> None:
    assert ours({f"{OPTIM}.override_optimizer_config.optimizer_cpu_offload": True})["optimizer.offload_fraction"] == 1.0
    assert ours({f"{OPTIM}.betas": [0.9, 0.98]})["optimizer.beta2"] == 0.98


def test_a_critic_that_trains_in_another_way_is_lost() -> None:
    settings = {"algorithm.adv_estimator": "gae", "critic.ppo_epochs": 2, "critic.grad_clip": 1.0}
    assert imported(settings).losses == {"critic.ppo_epochs": True}


def test_the_critics_optimizer_is_its_own() -> None:
    settings = {
        **GAE, "critic.grad_clip": 0.3, "critic.optim.betas": [0.9, 0.95], "critic.optim.lr_scheduler_type": "cosine",
        "critic.optim.min_lr_ratio": 0.5, "critic.optim.lr": 4e-6, "trainer.total_training_steps": 40,
    }  # fmt: skip
    found = {
        key.removeprefix("critic.optimizer."): value
        for key, value in ours(settings).items()
        if "critic.optimizer" in key
    }
    assert found == {
        "lr": 4e-6, "weight_decay": 0.01, "warmup_rollout_steps": 0, "schedule": "cosine", "min_lr": 2e-6,
        "decay_rollout_steps": 40, "beta1": 0.9, "beta2": 0.95, "clip_grad": 0.3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "is_lost"),
    [
        ("critic.megatron.tensor_model_parallel_size", 4, False),
        ("critic.model.lora_rank", 0, False),
        ("critic.model.lora_rank", 8, True),
        ("critic.optim.optimizer", "SGD", True),
        ("critic.value_weight", 0.1, True),
        ("critic.model.override_config", {"dropout": 0.1}, True),
    ],
)
def test_a_setting_of_the_critic_is_never_dropped(key: str, value: Any, is_lost: bool) -> None:
    assert imported({**GAE, key: value}).losses == ({key: True} if is_lost else {})


def test_a_warm_up_without_a_critic_leaves_updates_out() -> None:
    assert lost({"trainer.critic_warmup": 5}) == {"trainer.critic_warmup": False}
    assert lost({"trainer.critic_warmup": 0}) == lost({"trainer.critic_warmup": 1}) == {}


def test_a_critic_under_an_unknown_estimator_is_no_question_of_its_own() -> None:
    unknown = ForeignSetting("algorithm.adv_estimator", "${EST}", "run.sh line 1", ("EST",))
    lr = ForeignSetting("critic.optim.lr", 1e-6, "run.sh line 2")
    run = ForeignRun("verl", Path("run.sh"), "verl.trainer.main_ppo", "", (unknown, lr))
    conversion = convert(run, VERL)
    assert conversion.losses == {} and "algo.advantage" in conversion.asked
