"""When a load-balancing loss or a replay of routes is refused."""

from __future__ import annotations

from typing import Any

import pytest

from dapo_mcore.actor.model.expert_rules import check_routing
from dapo_mcore.architecture.reader import read_architecture
from dapo_mcore.errors import ConfigError
from tests.actor import families
from tests.actor.parity import Mesh, make_config

COEF, REPLAY = {"model__moe_aux_loss_coef": 0.01}, {"model__routing_replay": "scoring", "algo__old_logprobs": "actor"}


def check(family: str, megatron: dict[str, Any], **overrides: Any) -> None:
    model = make_config(Mesh(), **overrides).model
    check_routing(read_architecture(families.hf_config(family), 64), model, megatron)


@pytest.mark.parametrize(
    ("family", "megatron", "overrides", "message"),
    [
        (
            "qwen2",
            {},
            COEF,
            r"moe_aux_loss_coef 0\.01 would change nothing: this Qwen2ForCausalLM has no experts; leave it out",
        ),
        ("qwen2", {}, REPLAY, r"model\.routing_replay scoring would change nothing: .* has no experts"),
        ("mixtral", {"moe_expert_capacity_factor": 1.5}, COEF, r"capacity_factor 1\.5 drops tokens by the micro-batch"),
        (
            "mixtral",
            {"moe_router_fusion": True},
            COEF | REPLAY,
            r"routing_replay scoring gives .*moe_router_fusion true is one",
        ),
    ],
)
def test_what_would_have_no_effect_or_not_be_exact_is_refused(family, megatron, overrides, message):
    with pytest.raises(ConfigError, match=message):
        check(family, megatron, **overrides)


def test_both_go_with_experts_and_nothing_is_asked_of_a_run_without_them():
    check("deepseek-v3", {}, **COEF, **REPLAY)
    check("qwen2", {"moe_router_fusion": True})
    check("mixtral", {"moe_router_fusion": True}, **COEF)
