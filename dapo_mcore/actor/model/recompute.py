"""What `model.recompute` sets in Megatron, and which of its modules a model and its layers have.

Change here: what a level means, or when a module is refused. This module does not import Megatron, so a run can be checked
before it starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dapo_mcore.architecture.reader import Architecture
from dapo_mcore.config.model import ModelConfig
from dapo_mcore.errors import ConfigError

_PARTS: dict[str, tuple[str, Callable[[Architecture], Any]]] = {
    "mlp": ("dense MLP", lambda a: not a.num_experts or a.fields["moe_layer_freq"] != 1),
    "mla_up_proj": ("latent attention", lambda a: a.latent_attention),
    "moe": ("experts", lambda a: a.num_experts),
    "moe_act": ("experts", lambda a: a.num_experts),
    "shared_experts": ("shared experts", lambda a: a.fields.get("moe_shared_expert_intermediate_size")),
}
"""By module: the part of a model that it recomputes, and whether a model has it. All models have the others."""

_ENGINE_ONLY = {"layernorm": "mlp in dense layers, moe in layers with experts", "moe_act": "moe"}
"""Modules that need Transformer Engine's layers, with what to use elsewhere.

megatron-core (0.16.1 to 0.19.2) recomputes norms only where Transformer Engine is installed (elsewhere the first step ends with
a NameError), and activations of experts only in grouped products.
"""


def megatron_fields(recompute: str | Sequence[str]) -> dict[str, Any]:
    """Return the fields of Megatron's TransformerConfig for a level or a list of modules."""
    if recompute == "none":
        return {}
    if recompute == "full":
        return dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    modules = ["core_attn"] if recompute == "selective" else list(recompute)
    return dict(recompute_granularity="selective", recompute_modules=modules)


def check_recompute(architecture: Architecture, model: ModelConfig, *, engine: bool) -> None:
    """Raise ConfigError for a module in `model.recompute` that would save nothing, or that the layers cannot recompute.

    engine  True if the layers are Transformer Engine's.
    """
    for module in model.recompute if isinstance(model.recompute, list) else []:
        part, is_in = _PARTS.get(module, ("", lambda _: True))
        if not is_in(architecture):
            raise ConfigError(
                f"model.recompute {module} would save nothing: this {architecture.name} has no {part}; leave {module} out"
            )
        if not engine and module in _ENGINE_ONLY:
            raise ConfigError(
                f"model.recompute {module} needs Transformer Engine's layers, but this run has local ones; use "
                f"{_ENGINE_ONLY[module]}, or install the extra `te` on a GPU machine"
            )
        if module == "layernorm" and not (architecture.num_experts or architecture.latent_attention):
            raise ConfigError(
                "model.recompute layernorm would save nothing: Transformer Engine fuses the norms of this model into the "
                "products after them; leave layernorm out, or use mlp"
            )
