"""What a load-balancing loss and routing replay ask of the model and of Megatron's own fields.

Change here: when `model.moe_aux_loss_coef` or `model.routing_replay` is refused. This module does not import Megatron, so a
run can be checked before it starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dapo_mcore.architecture.reader import Architecture
from dapo_mcore.config.model import ModelConfig
from dapo_mcore.errors import ConfigError


def check_routing(architecture: Architecture, model: ModelConfig, megatron: Mapping[str, Any]) -> None:
    """Raise ConfigError if the model has no experts, or if a field of the `megatron` section prevents what is asked for."""
    replay, coef = model.routing_replay, model.moe_aux_loss_coef
    asked = [f"model.moe_aux_loss_coef {coef:g}"] if coef else []
    asked += [f"model.routing_replay {replay}"] if replay != "none" else []
    if asked and not architecture.num_experts:
        raise ConfigError(f"{asked[0]} would change nothing: this {architecture.name} has no experts; leave it out")
    if coef and megatron.get("moe_expert_capacity_factor") is not None:
        raise ConfigError(
            f"{asked[0]} counts the tokens of each expert, but megatron.moe_expert_capacity_factor "
            f"{megatron['moe_expert_capacity_factor']} drops tokens by the micro-batch that they are in; leave out one"
        )
    if replay != "none" and megatron.get("moe_router_fusion"):
        raise ConfigError(
            f"{asked[-1]} gives the router its experts, but megatron.moe_router_fusion true is one kernel that chooses them "
            f"itself; leave out one"
        )
