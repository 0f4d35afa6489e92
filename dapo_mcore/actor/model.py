"""The policy as a Megatron GPTModel that stops at hidden states; the policy head makes the loss (actor/head.py).

Change here: how a Hugging Face config becomes Megatron's, and which layer implementations are used.
Anything in the HF config that is not understood is refused by name, never guessed.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from dapo_mcore.actor.attention import CoreAttention
from dapo_mcore.actor.layout import Layout
from dapo_mcore.actor.norm import RMSNorm
from dapo_mcore.config import Config, ModelConfig, ParallelConfig
from dapo_mcore.errors import ConfigError
from dapo_mcore.weights.mapping import WeightReader, find_parameter, import_parameter
from dapo_mcore.weights.shape import WeightShape, weight_shape


class PolicyModel(GPTModel):
    """A GPTModel whose last stage returns hidden states, so that the logits of a whole batch never exist."""

    def _postprocess(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """[s, b, H], this tensor-parallel rank's rows under sequence parallelism. Overrides megatron-core 0.16.1."""
        return hidden_states

    def head_weight(self) -> torch.Tensor:
        """[V/tp, H], the output projection; the embedding itself when they are tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def global_parameter_names(self) -> dict[str, str]:
        """Local parameter name → the same with the layer's number in the whole model."""
        first = self.decoder.layers[0].layer_number - 1 if len(self.decoder.layers) else 0
        return {name: _shift_layer(name, first) for name, _ in self.named_parameters()}

    def load_weights(self, reader: WeightReader, shape: WeightShape, layout: Layout) -> None:
        """Fills every local parameter from HF tensors, reading only this rank's slices."""
        names = self.global_parameter_names()
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                found = find_parameter(names[name], shape)
                value = import_parameter(found, reader, shape, layout.tensor_rank, layout.tensor)
                if value.shape != parameter.shape:
                    raise ConfigError(
                        f"{names[name]}: config.json implies shape {tuple(parameter.shape)} on this rank, "
                        f"but the stored tensors give {tuple(value.shape)}; config.json and weights disagree"
                    )
                parameter.copy_(value)


def _shift_layer(name: str, first: int) -> str:
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(int(parts[2]) + first)
    return ".".join(parts)


def build_model(config: Config, hf_config: Any, layout: Layout) -> PolicyModel:
    """This rank's part of the policy, with uninitialised weights. Raises ConfigError for what cannot be built."""
    shape = weight_shape(hf_config, layout.tensor)
    check_divisibility(hf_config, shape, config.parallel)
    megatron_config = transformer_config(config, hf_config, shape)
    rope = rope_arguments(hf_config)
    model = PolicyModel(
        megatron_config,
        layer_spec(megatron_config),
        vocab_size=shape.padded_vocab_size,
        max_sequence_length=hf_config.max_position_embeddings,
        pre_process=layout.is_first_stage,
        post_process=layout.is_last_stage,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        **rope,
    )
    return model.to(layout.device)


def uses_transformer_engine(model: ModelConfig) -> bool:
    """Whether layers come from Transformer Engine. Raises ConfigError when it is asked for and cannot be had."""
    available = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
    if model.transformer_impl == "transformer_engine" and not available:
        raise ConfigError(
            "model.transformer_impl transformer_engine needs a CUDA device and the transformer-engine package; "
            "install the extra `te` on a GPU machine or use transformer_impl auto"
        )
    return available and model.transformer_impl != "local"


def check_divisibility(hf_config: Any, shape: WeightShape, parallel: ParallelConfig) -> None:
    """Raises ConfigError where the mesh does not divide the model. The vocabulary is padded instead."""
    tensor, pipeline = parallel.tensor_parallel, parallel.pipeline_parallel
    sizes = {
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "intermediate_size": hf_config.intermediate_size,
    }
    usable = [t for t in range(1, shape.num_heads + 1) if not any(size % t for size in sizes.values())]
    for name, size in sizes.items():
        if size % tensor:
            raise ConfigError(f"tensor_parallel {tensor} does not divide {name} {size}; use {_listed(usable)}")
    if shape.num_layers % pipeline:
        divisors = [p for p in range(1, shape.num_layers + 1) if shape.num_layers % p == 0]
        raise ConfigError(
            f"pipeline_parallel {pipeline} does not divide num_hidden_layers {shape.num_layers}; use {_listed(divisors)}"
        )


def _listed(values: list[int]) -> str:
    *head, last = map(str, values)
    return f"{', '.join(head)} or {last}" if head else last


def transformer_config(config: Config, hf_config: Any, shape: WeightShape) -> TransformerConfig:
    """Megatron's configuration: what the HF config says, what the mesh needs, then the user's `megatron` section."""
    _refuse_unsupported(hf_config)
    owned = {
        **_architecture(hf_config, shape),
        **_mesh(config),
        **_implementation(config),
        **_recompute(config.model.recompute),
    }
    return TransformerConfig(**owned, **_passthrough(config.megatron, owned))


def _architecture(hf_config: Any, shape: WeightShape) -> dict[str, Any]:
    return dict(
        num_layers=shape.num_layers,
        hidden_size=hf_config.hidden_size,
        ffn_hidden_size=hf_config.intermediate_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=hf_config.rms_norm_eps,
        qk_layernorm=shape.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )


def _mesh(config: Config) -> dict[str, Any]:
    parallel = config.parallel
    return dict(
        tensor_model_parallel_size=parallel.tensor_parallel,
        pipeline_model_parallel_size=parallel.pipeline_parallel,
        context_parallel_size=parallel.context_parallel,
        sequence_parallel=parallel.sequence_parallel,
        # micro-batches have their own lengths; upstream allows that over pipeline stages only with this dispatcher
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        batch_p2p_comm=True,
        calculate_per_token_loss=True,
    )


def _implementation(config: Config) -> dict[str, Any]:
    dtype = torch.bfloat16 if config.model.dtype == "bf16" else torch.float32
    engine = uses_transformer_engine(config.model)
    return dict(
        transformer_impl="transformer_engine" if engine else "local",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=not torch.cuda.is_available(),
        attention_softmax_in_fp32=True,
        bias_activation_fusion=engine,
        bias_dropout_fusion=engine,
        apply_rope_fusion=engine,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
    )


def _recompute(mode: str) -> dict[str, Any]:
    if mode == "none":
        return {}
    if mode == "selective":
        return dict(recompute_granularity="selective", recompute_modules=["core_attn"])
    return dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


def _passthrough(extra: dict[str, Any], owned: dict[str, Any]) -> dict[str, Any]:
    """The user's `megatron` section. Raises ConfigError for unknown keys and for keys that other sections decide."""
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    for key in extra:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"megatron.{key} is not a field of megatron-core's TransformerConfig{hint}")
        if key in owned:
            raise ConfigError(
                f"megatron.{key} is decided by the model, parallel and batch sections (here {owned[key]!r}); set it there"
            )
    return extra


def rope_arguments(hf_config: Any) -> dict[str, Any]:
    """GPTModel's rotary arguments. Supports plain, linear and llama3 scaling; raises ConfigError otherwise."""
    rope = dict(getattr(hf_config, "rope_parameters", None) or getattr(hf_config, "rope_scaling", None) or {})
    base = rope.get("rope_theta") or getattr(hf_config, "rope_theta", 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return dict(rotary_base=base)
    if kind == "linear":
        return dict(rotary_base=base, seq_len_interpolation_factor=rope["factor"])
    fixed = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    if kind == "llama3" and all(rope.get(key) == value for key, value in fixed.items()):
        return dict(rotary_base=base, rope_scaling=True, rope_scaling_factor=rope["factor"])
    raise ConfigError(
        f"rope scaling {rope} is not supported; megatron-core 0.16.1 has default, linear and llama3 {fixed}"
    )


def _refuse_unsupported(hf_config: Any) -> None:
    if getattr(hf_config, "hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act {hf_config.hidden_act} is not supported; supported is silu")
    if getattr(hf_config, "use_sliding_window", False):
        raise ConfigError("use_sliding_window true is not supported; set it false in config.json if the model allows")
    if getattr(hf_config, "mlp_bias", False):
        raise ConfigError("mlp_bias true is not supported")


def layer_spec(config: TransformerConfig) -> ModuleSpec | TransformerBlockSubmodules:
    """The layers: Transformer Engine's, or upstream's local ones with our norm and attention in their places."""
    if config.transformer_impl == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = CoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[spec] * get_num_layers_to_build(config), layer_norm=RMSNorm)
