"""Settings of verl that mean nothing here are named one by one: an unknown one beside them is a loss."""

from __future__ import annotations

import pytest

from dapo_mcore.foreign.tables.verl_meaningless import MEANINGLESS
from tests.foreign.verl_runs import A, M, R, imported, lost


def test_a_pattern_stands_for_sections_that_hold_no_number_of_the_objective() -> None:
    patterns = {key for rule in MEANINGLESS for key in rule.keys if "*" in key}
    sections = ("profiler", "_target_", "hydra", "checkpoint_engine", "prometheus", "server", "trtllm", "transfer_queue",
                "reward_model.", "lora.freeze_", "qat", "overlong_buffer", "ref.megatron.override_transformer_config")  # fmt: skip
    assert sorted(key for key in patterns if not any(section in key for section in sections)) == []


@pytest.mark.parametrize(
    "key",
    [
        f"{A}.policy_loss.new_coef", f"{A}.new_clip", f"{A}.fsdp_config.new_quantizer", f"{R}.val_kwargs.min_p", f"{M}.new_head",
        "reward_model.reward_kwargs.length_weight", "reward_model.new_part", "reward_manager.new_part", "data.new_filter",
        "algorithm.rollout_correction.new_level", "algorithm.kl_ctrl.new_rate", "actor_rollout_ref.ref.new_part",
        f"{A}.adaptive_entropy.new_rate", f"{A}.optim.new_schedule", f"{A}.router_replay.new_mode",
    ],
)  # fmt: skip
def test_an_unknown_setting_in_a_known_section_is_lost_with_its_objective(key: str) -> None:
    assert lost({key: 1}) == {key: True}


def test_an_unknown_setting_of_the_trainer_is_a_loss() -> None:
    assert lost({"trainer.new_thing": 1}) == {"trainer.new_thing": False}


def test_parts_of_what_is_off() -> None:
    settings = {
        f"{M}.lora_alpha": 16,
        "algorithm.kl_ctrl.horizon": 10000,
        f"{A}.tau_pos": 1.0,
        "reward_model.model.path": "/rm",
    }
    conversion = imported({"algorithm.adv_estimator": "gae", **settings})
    assert {conversion.kind_of(key) for key in settings} == {"meaningless"}
