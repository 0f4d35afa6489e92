"""Which implementation each part of a layer has: Transformer Engine's, or upstream's local one with ours in its place.

Change here: the layer implementations. Without Transformer Engine, experts are separate MLPs (SequentialMLP); with it,
one grouped product (TEGroupedMLP).
"""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from dapo_mcore.actor.model.attention import CoreAttention
from dapo_mcore.actor.model.latent import LatentAttention, WholeLinear, use_whole_linear
from dapo_mcore.actor.model.norm import RMSNorm
from dapo_mcore.config.sections import ModelConfig
from dapo_mcore.errors import ConfigError


def uses_transformer_engine(model: ModelConfig) -> bool:
    """Whether layers come from Transformer Engine. Raises ConfigError when it is asked for and cannot be had."""
    available = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
    if model.transformer_impl == "transformer_engine" and not available:
        raise ConfigError(
            "model.transformer_impl transformer_engine needs a CUDA device and the transformer-engine package; "
            "install the extra `te` on a GPU machine or use transformer_impl auto"
        )
    return available and model.transformer_impl != "local"


def layer_specs(config: TransformerConfig) -> TransformerBlockSubmodules:
    """The layers of this rank's pipeline stage; dense and expert layers as `config.moe_layer_freq` says."""
    engine = config.transformer_impl == "transformer_engine"
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=engine, normalization="RMSNorm")
    if config.multi_latent_attention:
        for layer in block.layer_specs:
            layer.submodules.self_attention.module = LatentAttention
    if engine:
        return block
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # 0.16.1 tests it for None, but defines it only with Transformer Engine
    layers = [_without_transformer_engine(layer, config) for layer in block.layer_specs]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def _without_transformer_engine(layer: ModuleSpec, config: TransformerConfig) -> ModuleSpec:
    """Upstream's local layer with our norm and attention."""
    submodules = dataclasses.replace(
        layer.submodules,
        input_layernorm=RMSNorm,
        pre_mlp_layernorm=RMSNorm,
        self_attention=dataclasses.replace(
            layer.submodules.self_attention, submodules=_attention(layer.submodules.self_attention.submodules, config)
        ),
        sharded_state_dict_keys_map=_stored_names(_has_experts(layer), config),
    )
    return dataclasses.replace(layer, submodules=submodules)


def _has_experts(layer: ModuleSpec) -> bool:
    mlp = layer.submodules.mlp  # a ModuleSpec, or from 0.18 on a functools.partial
    return MoELayer in (getattr(mlp, "module", None), getattr(mlp, "func", None))


def _stored_names(has_experts: bool, config: TransformerConfig) -> dict[str, str]:
    """Names in a checkpoint where they differ from ours: Transformer Engine fuses norms into the layers after them, except
    before experts, and a checkpoint is to fit both."""
    names = {} if has_experts else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    if config.multi_latent_attention:
        latent = {"q": "self_attention.q_layernorm.", "kv": "self_attention.kv_layernorm."}
        return names | {own: f"self_attention.linear_{which}_up_proj.layer_norm_" for which, own in latent.items()}
    return names | {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}


def _attention(submodules: Any, config: TransformerConfig) -> Any:
    """Upstream's attention submodules with our core attention and norms."""
    changed: dict[str, Any] = {"core_attention": CoreAttention}
    if config.multi_latent_attention:
        use_whole_linear()
        changed |= dict(linear_q_down_proj=WholeLinear, linear_kv_down_proj=WholeLinear)
        changed |= dict(q_layernorm=RMSNorm, kv_layernorm=RMSNorm)
    elif config.qk_layernorm:
        changed |= dict(q_layernorm=RMSNorm, k_layernorm=RMSNorm)
    return dataclasses.replace(submodules, **changed)
