"""Which implementation each part of a layer has: Transformer Engine's, or upstream's local one with ours in its place.

Change here: the layer implementations. Without Transformer Engine, experts are separate MLPs (SequentialMLP); with it,
one grouped product (TEGroupedMLP).
"""

from __future__ import annotations

import dataclasses
import importlib.util

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from dapo_mcore.actor.attention import CoreAttention
from dapo_mcore.actor.norm import RMSNorm
from dapo_mcore.config import ModelConfig
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
    if engine:
        return block
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # 0.16.1 tests it for None, but defines it only with Transformer Engine
    layers = [_without_transformer_engine(layer, config) for layer in block.layer_specs]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def _without_transformer_engine(layer: ModuleSpec, config: TransformerConfig) -> ModuleSpec:
    """Upstream's local layer with our norm and attention."""
    attention = dataclasses.replace(layer.submodules.self_attention.submodules, core_attention=CoreAttention)
    if config.qk_layernorm:
        attention = dataclasses.replace(attention, q_layernorm=RMSNorm, k_layernorm=RMSNorm)
    keys = dict(layer.submodules.sharded_state_dict_keys_map)
    if layer.submodules.mlp.module is MoELayer:
        # stored as Transformer Engine stores it, which fuses this norm into dense layers only
        del keys["pre_mlp_layernorm."]
    submodules = dataclasses.replace(
        layer.submodules,
        input_layernorm=RMSNorm,
        pre_mlp_layernorm=RMSNorm,
        self_attention=dataclasses.replace(layer.submodules.self_attention, submodules=attention),
        sharded_state_dict_keys_map=keys,
    )
    return dataclasses.replace(layer, submodules=submodules)
