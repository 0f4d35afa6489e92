"""What recomputation keeps, and that gradients do not depend on it. Which modules are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dapo_mcore.actor.model.policy import build_policy
from dapo_mcore.actor.model.recompute import check_recompute, megatron_fields
from dapo_mcore.architecture.reader import read_architecture
from dapo_mcore.config.model import ModelConfig
from dapo_mcore.errors import ConfigError
from tests.actor import families
from tests.actor.parity import Mesh, make_config

TOKENS = 24
LEVELS: dict[str, list[str | list[str]]] = {
    "qwen2": ["selective", ["mlp"], ["core_attn", "mlp"], "full"],
    "qwen2-moe": [["mlp"], ["shared_experts"], ["moe"], ["core_attn", "mlp", "moe"], "full"],
    "mixtral": [["core_attn", "moe"], "full"],
    "deepseek-v3": [["core_attn"], ["core_attn", "mla_up_proj"], ["mlp", "shared_experts"], ["moe"], "full"],
}
"""By family, what its local layers can recompute."""
ATTENTION_ONLY = ("selective", ["core_attn"])
"""A CPU's attention kernel keeps no scores, and here no sequence is padded."""
LAST_LAYER = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1}


def check(family: str, *modules: str, engine: bool) -> None:
    architecture = read_architecture(families.hf_config(family), 64)
    check_recompute(architecture, ModelConfig(path="unused", recompute=list(modules)), engine=engine)


@pytest.mark.parametrize(
    ("family", "fp8"),
    [
        *((family, None) for family in LEVELS),
        *(("qwen2", {"recipe": recipe}) for recipe in ("tensorwise", "blockwise", "mxfp8")),
        ("mixtral", {"recipe": "blockwise"}),
    ],
)
def test_gradients_are_those_without_recomputation_and_less_is_kept(alone, family, fp8):
    """Bit for bit, except that recomputed shared experts add their part to the gradient of their input in another order."""
    plain, kept = gradients(alone, family, model__fp8=fp8)
    assert len(plain) > 10
    settings: list[dict[str, Any]] = [{"model__recompute": level} for level in LEVELS[family]]
    for setting in [*settings, {"megatron": LAST_LAYER}]:
        found, bytes_kept = gradients(alone, family, model__fp8=fp8, **setting)
        error = max(float((found[name] - plain[name]).norm() / plain[name].norm()) for name in plain)
        assert error <= (1e-6 if "shared_experts" in setting.get("model__recompute", ()) else 0.0), setting
        if setting.get("model__recompute") not in ATTENTION_ONLY:
            assert bytes_kept < kept, setting


def test_a_recomputed_mlp_keeps_its_input_only(alone):
    """The gate and up projections, and their product: 3 · intermediate_size numbers per token and layer."""
    (_, kept), (_, without_mlp) = gradients(alone, "qwen2"), gradients(alone, "qwen2", model__recompute=["mlp"])
    config = families.hf_config("qwen2")
    numbers = TOKENS * config.num_hidden_layers * 3 * config.intermediate_size
    assert kept - without_mlp >= 4 * numbers


def gradients(layout: Any, family: str, **overrides: Any) -> tuple[dict[str, torch.Tensor], int]:
    """Return the gradients of a model with fixed weights, and the bytes that its forward pass keeps for the backward pass."""
    (model,) = build_policy(make_config(Mesh(), **overrides), families.hf_config(family), layout)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1, generator=noise)
    tokens = torch.randint(families.VOCAB, (1, TOKENS), generator=noise)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model(tokens, torch.arange(TOKENS)[None], None)
    (hidden * torch.randn(hidden.shape, generator=noise)).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return found, sum(storage.nbytes() for key, storage in kept.items() if key not in weights)


def test_a_level_or_a_list_becomes_megatrons_fields():
    assert megatron_fields("none") == {}
    assert megatron_fields("selective") == megatron_fields(["core_attn"])
    assert megatron_fields(["mlp"]) == {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    assert megatron_fields("full")["recompute_granularity"] == "full"


@pytest.mark.parametrize(
    ("family", "module", "engine", "message"),
    [
        (
            "qwen3-moe",
            "mlp",
            True,
            r"recompute mlp would save nothing: this Qwen3MoeForCausalLM has no dense MLP; leave",
        ),
        ("qwen2", "moe", True, "has no experts"),
        ("qwen2", "moe_act", True, "has no experts"),
        ("qwen2", "shared_experts", False, "has no shared experts"),
        ("mixtral", "shared_experts", False, "has no shared experts"),
        ("qwen2", "mla_up_proj", True, "has no latent attention"),
        ("qwen2", "layernorm", True, "Transformer Engine fuses the norms of this model into the products after them"),
        ("qwen2", "layernorm", False, r"layernorm needs Transformer Engine's layers, .*; use mlp in dense layers"),
        (
            "mixtral",
            "moe_act",
            False,
            r"moe_act needs Transformer Engine's layers, .*; use moe, or install the extra `te`",
        ),
    ],
)
def test_a_module_that_saves_nothing_or_cannot_be_recomputed_is_refused(family, module, engine, message):
    with pytest.raises(ConfigError, match=message):
        check(family, module, engine=engine)


def test_transformer_engines_layers_recompute_more():
    check("deepseek-v3", "layernorm", "mla_up_proj", "core_attn", "mlp", "moe_act", "shared_experts", engine=True)
    check("mixtral", "layernorm", "moe_act", engine=True)
