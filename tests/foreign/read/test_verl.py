"""Scripts written in verl's style, and hydra's resolved configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from dapo_mcore.errors import ConfigError
from dapo_mcore.foreign.read.verl import entry_place, read_verl
from dapo_mcore.foreign.settings import ForeignRun

SCRIPT = """#!/usr/bin/env bash
set -xeuo pipefail
run_name="tiny-$(date +%m%d)"
longest_prompt=$((512 * 2))
longest_answer=$((1024 * 4))
GPUS=${GPUS:-8}
CORPUS=${CORPUS:-"${HOME}/corpus"}
tests="['$CORPUS/one.parquet', '$CORPUS/two.parquet']"
SAMPLING=(
    actor_rollout_ref.rollout.n=16
    actor_rollout_ref.rollout.top_k=-1   # all
)
RAY_ADDRESS=$RAY_ADDRESS ray job submit --runtime-env=env.yaml -- python3 -m recipe.dapo.main_dapo \\
    --config-path=config --config-name='dapo_megatron_trainer.yaml' \\
    data.train_files="${CORPUS}/train.parquet" data.val_files="$tests" \\
    data.max_prompt_length=${longest_prompt} \\
    "${SAMPLING[@]}" \\
    +actor_rollout_ref.actor.megatron.override_transformer_config.moe_permute_fusion=True \\
    trainer.n_gpus_per_node=$GPUS trainer.nnodes=$NODES \\
    trainer.logger=['console','wandb'] trainer.experiment_name="$run_name" \\
    actor_rollout_ref.rollout.n=8 ~trainer.device "$@"
"""


def read(folder: Path, text: str, name: str = "run.sh") -> ForeignRun:
    (folder / name).write_text(text)
    return read_verl(folder / name)


def test_a_script(tmp_path: Path) -> None:
    run = read(tmp_path, SCRIPT)
    assert (run.dialect, run.entry, run.config, run.complete) == (
        "verl",
        "recipe.dapo.main_dapo",
        "dapo_megatron_trainer",
        False,
    )
    found = {
        setting.key: (setting.value, setting.where.removeprefix("run.sh line "), setting.unknown)
        for setting in run.settings
    }
    assert found == {
        "data.train_files": ("~/corpus/train.parquet", "15", ()),
        "data.val_files": (["~/corpus/one.parquet", "~/corpus/two.parquet"], "15", ()),
        "data.max_prompt_length": (1024, "16", ()),
        "actor_rollout_ref.rollout.n": (8, "21", ()),
        "actor_rollout_ref.rollout.top_k": (-1, "11", ()),
        "actor_rollout_ref.actor.megatron.override_transformer_config.moe_permute_fusion": (True, "18", ()),
        "trainer.n_gpus_per_node": (8, "19", ()),
        "trainer.nnodes": ("${NODES}", "19", ("NODES",)),
        "trainer.logger": (["console", "wandb"], "20", ()),
        "trainer.experiment_name": ("tiny-$(date +%m%d)", "20", ("$(date +%m%d)",)),
        "trainer.device": (None, "21", ()),
    }
    assert [setting.key for setting in run.settings if setting.removed] == ["trainer.device"]


def test_values_that_hang_on_a_condition(tmp_path: Path) -> None:
    text = "if nvidia-smi; then tp=4; else tp=2; fi\npython -m verl.trainer.main_ppo a.tp=$tp $EXTRA stray"
    run = read(tmp_path, text)
    (setting,) = run.settings
    assert (setting.value, setting.others, setting.depends) == (
        4,
        (2,),
        ("line 1: if nvidia-smi; then tp=4; else tp=2; fi",),
    )
    assert run.notes == (
        "line 2: ${EXTRA} may hold further settings; write them into a copy of the script",
        "line 2: stray is no setting of the form key=value",
    )


@pytest.mark.parametrize(
    ("command", "entry"),
    [
        ("python3 -m verl.trainer.main_ppo a=1", "verl.trainer.main_ppo"),
        ("python3 -u -m recipe.r1.main_prime", "recipe.r1.main_prime"),
        ("torchrun --nproc 8 recipe/x/main_x.py", "recipe/x/main_x.py"),
        (
            "python -m verl.experimental.fully_async_policy.fully_async_main",
            "verl.experimental.fully_async_policy.fully_async_main",
        ),
        ("python3 -m verl.trainer.main_generation a=1", None),
        ("torchrun -m verl.trainer.fsdp_sft_trainer", None),
        ("echo verl.trainer.main_ppo", None),
        ("tee main_ppo.log", None),
    ],
)
def test_entries(command: str, entry: str | None) -> None:
    words = command.split()
    place = entry_place(words)
    assert (words[place] if place is not None else None) == entry


def test_other_files_are_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no training command in this script; give a script that starts verl's trainer"
    ):
        read(tmp_path, "python3 train.py")
    with pytest.raises(ConfigError, match=r"no section actor_rollout_ref, which verl's configurations have; give"):
        read(tmp_path, "algorithm: {}", "config.yaml")


def test_hydras_resolved_configuration(tmp_path: Path) -> None:
    text = """
algorithm: {adv_estimator: grpo, kl_ctrl: {kl_coef: 1e-3}}
actor_rollout_ref:
  model: {path: "${oc.env:MODEL_ROOT}/m", lora: {}}
  rollout: {n: 8, val_kwargs: {n: "${..n}"}}
  actor: {ppo_epochs: 1, tokens: "${oc.select:data.tokens,7}", home: "${oc.env:ROOT,/x}/y"}
"""
    run = read(tmp_path, text, "config.yaml")
    assert run.complete
    assert {setting.key: (setting.value, setting.unknown) for setting in run.settings} == {
        "algorithm.adv_estimator": ("grpo", ()),
        "algorithm.kl_ctrl.kl_coef": (1e-3, ()),
        "actor_rollout_ref.model.path": ("${MODEL_ROOT}/m", ("MODEL_ROOT",)),
        "actor_rollout_ref.model.lora": ({}, ()),
        "actor_rollout_ref.rollout.n": (8, ()),
        "actor_rollout_ref.rollout.val_kwargs.n": (8, ()),
        "actor_rollout_ref.actor.ppo_epochs": (1, ()),
        "actor_rollout_ref.actor.tokens": (7, ()),
        "actor_rollout_ref.actor.home": ("/x/y", ()),
    }


OWN = "python3 -m verl.trainer.main_ppo --config-path=$PWD/config --config-name='my_own' data.train_batch_size=8\n"


def test_a_configuration_beside_the_script_is_below_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "my_own.yaml").write_text(
        "hydra: {searchpath: [a]}\ndefaults: [ppo_megatron_trainer, _self_]\ndata: {train_batch_size: 4, shuffle: false}\n"
    )
    run = read(tmp_path, OWN)
    assert run.config == "ppo_megatron_trainer"
    assert {setting.key: setting.value for setting in run.settings} == {
        "data.train_batch_size": 8,
        "data.shuffle": False,
    }


def test_a_configuration_that_is_not_there_is_a_setting(tmp_path: Path) -> None:
    run = read(tmp_path, OWN)
    assert run.by_key()["config-name"].value == "my_own"
    known = read(tmp_path, OWN.replace("my_own", "ppo_trainer.yaml"))
    assert "config-name" not in known.by_key() and known.config == "ppo_trainer"


def test_a_configuration_above_the_script_is_read(tmp_path: Path) -> None:
    """Scripts are started in the project's root, and name the folder from there."""
    (tmp_path / "examples" / "config").mkdir(parents=True)
    (tmp_path / "examples" / "config" / "my_own.yaml").write_text("defaults: [ppo_trainer]\ndata: {shuffle: false}\n")
    below = tmp_path / "examples" / "math"
    below.mkdir()
    for folder in ("$PWD/examples/config", "$(pwd)/examples/config", "$ROOT/examples/config", "examples/config"):
        run = read(below, OWN.replace("$PWD/config", folder))
        assert (run.config, run.by_key()["data.shuffle"].value) == ("ppo_trainer", False), folder
        assert run.notes == (f"--config-name my_own is {tmp_path / 'examples' / 'config' / 'my_own.yaml'}",)
    absolute = read(below, OWN.replace("$PWD/config", "/opt/config"))
    assert absolute.by_key()["config-name"].value == "my_own"
