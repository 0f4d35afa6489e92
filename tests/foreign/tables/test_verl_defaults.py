"""Which of verl's defaults hold for a program and a configuration."""

from __future__ import annotations

import pytest

from dapo_mcore.foreign.tables.verl_defaults import is_megatron, verl_defaults
from tests.foreign.verl_runs import A, verl_run


@pytest.mark.parametrize(
    ("settings", "config", "megatron"),
    [
        ({}, "", False),
        ({}, "ppo_megatron_trainer", True),
        ({f"{A}.strategy": "megatron"}, "", True),
        ({f"{A}.strategy": "fsdp2"}, "ppo_megatron_trainer", False),
        ({f"{A}.megatron.tensor_model_parallel_size": 2}, "", True),
    ],
)
def test_the_backend(settings: dict[str, object], config: str, megatron: bool) -> None:
    run = verl_run(settings, config=config)
    assert is_megatron(run) == megatron
    assert verl_defaults(run)[f"{A}.strategy"] == ("megatron" if megatron else "fsdp")


def test_the_recipe_has_defaults_of_its_own() -> None:
    main_ppo, main_dapo = verl_defaults(verl_run({})), verl_defaults(verl_run({}, entry="recipe.dapo.main_dapo"))
    assert (main_ppo["reward_model.reward_manager"], main_dapo["reward_model.reward_manager"]) == ("naive", "dapo")
    assert "algorithm.filter_groups.enable" not in main_ppo and main_dapo["algorithm.filter_groups.enable"] is False
