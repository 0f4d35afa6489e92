"""The implementation of each part of a layer: Transformer Engine's, or upstream's local one with ours where it falls short.

Change here: the layer implementations. Without Transformer Engine, experts are separate MLPs (SequentialMLP); with it, they
are one grouped matrix product (TEGroupedMLP).
"""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from dapo_mcore.actor.model.attention import CoreAttention
from dapo_mcore.actor.model.latent import LatentAttention, ReplicatedLinear, use_replicated_linear
from dapo_mcore.actor.model.routing import PolicyRouter
from dapo_mcore.actor.model.swiglu import use_own_swiglu
from dapo_mcore.config.model import ModelConfig
from dapo_mcore.errors import ConfigError


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dim, for runs without Transformer Engine.

    Upstream's WrappedTorchNorm (megatron-core 0.16.1, transformer/torch_norm.py) refuses sequence parallelism. A norm acts on
    single tokens, so it only needs the attribute `weight.sequence_parallel`: with it, finalize_model_grads sums the weight's
    gradient over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the normalised `hidden` [..., H], with the same shape and dtype."""
        return functional.rms_norm(hidden, (hidden.size(-1),), self.weight, self.eps)


def uses_transformer_engine(model: ModelConfig) -> bool:
    """Return True if layers come from Transformer Engine. Raises ConfigError if the config wants it and it is unavailable."""
    available = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
    if model.transformer_impl == "transformer_engine" and not available:
        raise ConfigError(
            "model.transformer_impl transformer_engine needs a CUDA device and the transformer-engine package; "
            "install the extra `te` on a GPU machine or use transformer_impl auto"
        )
    return available and model.transformer_impl != "local"


def has_apex_accumulation() -> bool:
    """Return True if NVIDIA's apex can add local layers' weight gradients to main_grad. PyPI's `apex` is another package."""
    return torch.cuda.is_available() and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def accumulate_in_products(model: torch.nn.Module) -> None:
    """Let Transformer Engine's layers add weight gradients to fp32 main_grad in the matrix products that compute them.

    Otherwise each gradient is rounded to bf16, and a pass of its own adds it. Upstream's gradient_accumulation_fusion would set
    this, but then its output layer (megatron-core 0.16.1 to 0.19.2), which never runs here, asks for apex. With FP8 the first
    micro-batch of a schedule call overwrites main_grad, so a gradient step must be one call.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def layer_specs(config: TransformerConfig, chunk: int = 0) -> TransformerBlockSubmodules:
    """Return the layers of a chunk of this rank's pipeline stage; `config.moe_layer_freq` says which of them have experts."""
    use_own_swiglu()
    engine = config.transformer_impl == "transformer_engine"
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=engine, normalization="RMSNorm", vp_stage=chunk)
    for layer in block.layer_specs:
        if config.multi_latent_attention:
            layer.submodules.self_attention.module = LatentAttention
        if _has_experts(layer):
            _expert_submodules(layer).router = PolicyRouter
    if engine:
        return block
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # 0.16.1 compares it with None, but defines it only with Transformer Engine
    layers = [_without_transformer_engine(layer, config) for layer in block.layer_specs]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def _without_transformer_engine(layer: ModuleSpec, config: TransformerConfig) -> ModuleSpec:
    """Return upstream's local layer with our norms and attention."""
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


def _expert_submodules(layer: ModuleSpec) -> MoESubmodules:
    mlp = layer.submodules.mlp
    return mlp.submodules if isinstance(mlp, ModuleSpec) else mlp.keywords["submodules"]


def _stored_names(has_experts: bool, config: TransformerConfig) -> dict[str, str]:
    """Return the prefixes that are different in a checkpoint, by our prefixes.

    A checkpoint fits runs with and without Transformer Engine, so it has Transformer Engine's names. There a norm is part of
    the layer after it, except before experts.
    """
    names = {} if has_experts else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    if config.multi_latent_attention:
        latent = {"q": "self_attention.q_layernorm.", "kv": "self_attention.kv_layernorm."}
        return names | {own: f"self_attention.linear_{which}_up_proj.layer_norm_" for which, own in latent.items()}
    return names | {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}


def _attention(submodules: Any, config: TransformerConfig) -> Any:
    """Return upstream's attention submodules with our core attention and norms."""
    changed: dict[str, Any] = {"core_attention": CoreAttention}
    if config.multi_latent_attention:
        use_replicated_linear()
        changed |= dict(linear_q_down_proj=ReplicatedLinear, linear_kv_down_proj=ReplicatedLinear)
        changed |= dict(q_layernorm=RMSNorm, kv_layernorm=RMSNorm)
    elif config.qk_layernorm:
        changed |= dict(q_layernorm=RMSNorm, k_layernorm=RMSNorm)
    return dataclasses.replace(submodules, **changed)
