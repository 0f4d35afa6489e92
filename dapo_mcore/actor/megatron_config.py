"""Megatron's TransformerConfig: what the model is, what the mesh needs, how layers are made, then the user's own fields.

Change here: which of Megatron's options the project decides, and what a mesh must fulfil for a model. Which of the others a
user may set: megatron_fields.py.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from dapo_mcore.actor.architecture import Architecture
from dapo_mcore.actor.layers import uses_transformer_engine
from dapo_mcore.actor.megatron_fields import check_fields
from dapo_mcore.config import Config, ParallelConfig
from dapo_mcore.errors import ConfigError, listed

_STAGE_FIELDS = (
    "pipeline_model_parallel_layout",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)


def transformer_config(config: Config, architecture: Architecture) -> TransformerConfig:
    """Raises ConfigError for a mesh that does not fit the model, and for fields of the `megatron` section that may not
    be set there."""
    check_mesh(architecture, config.parallel)
    kind = MLATransformerConfig if architecture.latent_attention else TransformerConfig
    owned = {
        **architecture.fields,
        **_mesh(config.parallel),
        **_implementation(config, architecture),
        **_recompute(config.model.recompute),
        "moe_router_load_balancing_type": "none",
    }
    engine = owned["transformer_impl"] == "transformer_engine"
    check_fields(config.megatron, engine=engine, owned=owned)
    chosen = config.megatron
    try:
        built = kind(**_defaults(architecture.num_layers, config.parallel.pipeline_parallel, chosen) | owned | chosen)
        _check_stages(built)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"megatron-core refuses the configuration (megatron section: {chosen}): {error}") from error
    return built


def _check_stages(built: TransformerConfig) -> None:
    """Raises ConfigError for stages chosen in the `megatron` section that this project, or upstream silently, cannot build."""
    if (built.virtual_pipeline_model_parallel_size or 1) > 1:
        raise ConfigError(
            f"the megatron section asks for {built.virtual_pipeline_model_parallel_size} virtual pipeline stages a rank; "
            f"interleaved pipelines are not supported: leave it out"
        )
    if built.pipeline_model_parallel_layout is not None:
        return  # which upstream checks itself
    counts = [get_num_layers_to_build(built, pp_rank=stage) for stage in range(built.pipeline_model_parallel_size)]
    if sum(counts) != built.num_layers or min(counts) < 1:
        raise ConfigError(
            f"the megatron section spreads {built.num_layers} layers over pipeline stages as {counts}; every layer must "
            f"have a stage and every stage a layer"
        )


def _defaults(num_layers: int, stages: int, chosen: dict[str, Any]) -> dict[str, Any]:
    """What the `megatron` section may change."""
    # routing is sharp: rounding logits to bf16 would choose other experts than the rollout engine
    defaults: dict[str, Any] = dict(moe_router_dtype="fp32")
    # micro-batches have their own lengths; upstream allows that over pipeline stages only with this one and `flex`
    defaults["moe_token_dispatcher_type"] = "alltoall"
    if num_layers % stages and not any(key in chosen for key in _STAGE_FIELDS):
        defaults["pipeline_model_parallel_layout"] = _pipeline_layout(num_layers, stages)
    return defaults


def check_mesh(architecture: Architecture, parallel: ParallelConfig) -> None:
    """Raises ConfigError where the mesh does not divide the model. The vocabulary is padded instead."""
    _check_tensor_parallel(architecture, parallel.tensor_parallel)
    latent = architecture.latent_attention
    if (latent or architecture.num_experts) and parallel.tensor_parallel > 1 and not parallel.sequence_parallel:
        raise ConfigError(
            f"tensor_parallel {parallel.tensor_parallel} with {'latent attention' if latent else 'experts'} needs "
            f"sequence_parallel: without it every rank would do the same work; set parallel.sequence_parallel true"
        )
    if parallel.pipeline_parallel > architecture.num_layers:
        raise ConfigError(
            f"pipeline_parallel {parallel.pipeline_parallel} leaves stages empty: num_hidden_layers is "
            f"{architecture.num_layers}; use at most {architecture.num_layers}"
        )
    if architecture.num_experts:
        _check_experts(architecture, parallel)
    elif parallel.expert_parallel > 1 or parallel.expert_tensor_parallel is not None:
        raise ConfigError(
            f"{architecture.name} has no experts, so parallel.expert_parallel must be 1 (here "
            f"{parallel.expert_parallel}) and expert_tensor_parallel unset (here {parallel.expert_tensor_parallel})"
        )


def _check_tensor_parallel(architecture: Architecture, tensor: int) -> None:
    fields = architecture.fields
    heads, groups = fields["num_attention_heads"], fields["num_query_groups"]
    sizes = {"num_attention_heads": heads, **_tensor_parallel_widths(fields)}
    rows = (heads + 2 * groups) * fields["kv_channels"]

    def usable(size: int) -> bool:
        return not any(s % size for s in sizes.values()) and 0 in (groups % size, size % groups) and rows % size == 0

    remedy = f"use {listed([size for size in range(1, heads + 1) if usable(size)])}"
    for name, size in sizes.items():
        if size % tensor:
            raise ConfigError(f"tensor_parallel {tensor} does not divide {name} {size}; {remedy}")
    if groups % tensor and tensor % groups:
        raise ConfigError(
            f"tensor_parallel {tensor} is neither a divisor nor a multiple of num_key_value_heads {groups}; {remedy}"
        )
    if rows % tensor:
        raise ConfigError(f"tensor_parallel {tensor} does not divide the {rows} rows of q, k and v; {remedy}")


def _tensor_parallel_widths(fields: dict[str, Any]) -> dict[str, int]:
    """MLP widths that are cut over the tensor-parallel group, by their keys in config.json."""
    has_dense_layers = "num_moe_experts" not in fields or fields["moe_layer_freq"] != 1
    widths = {"intermediate_size": fields["ffn_hidden_size"]} if has_dense_layers else {}
    shared = fields.get("moe_shared_expert_intermediate_size")
    return widths | ({"shared_expert_intermediate_size": shared} if shared else {})


def _check_experts(architecture: Architecture, parallel: ParallelConfig) -> None:
    count, width = architecture.num_experts, architecture.fields["moe_ffn_hidden_size"]
    for name, size, key, total in (
        ("expert_parallel", parallel.expert_parallel, "the number of experts", count),
        ("expert_tensor_parallel", parallel.expert_tensor_size, "the experts' intermediate size", width),
    ):
        if total % size:
            divisors = [d for d in range(1, total + 1) if total % d == 0]
            raise ConfigError(f"{name} {size} does not divide {key} {total}; use {listed(divisors)}")


def split_layers(num_layers: int, stages: int) -> list[int]:
    """The number of layers of each pipeline stage.

    What does not divide goes to the middle stages, the later ones first, for they hold fewer micro-batches; then to the
    first stage; the last, with the policy head, comes last.
    """
    order = [*range(stages - 2, 0, -1), 0, stages - 1]
    extra = order[: num_layers % stages]
    return [num_layers // stages + (stage in extra) for stage in range(stages)]


def _mesh(parallel: ParallelConfig) -> dict[str, Any]:
    return dict(
        tensor_model_parallel_size=parallel.tensor_parallel,
        pipeline_model_parallel_size=parallel.pipeline_parallel,
        context_parallel_size=parallel.context_parallel,
        expert_model_parallel_size=parallel.expert_parallel,
        expert_tensor_parallel_size=parallel.expert_tensor_size,
        sequence_parallel=parallel.sequence_parallel,
        variable_seq_lengths=True,
        batch_p2p_comm=True,
        calculate_per_token_loss=True,
    )


def _pipeline_layout(num_layers: int, stages: int) -> list[list[str]]:
    layout = [["decoder"] * count for count in split_layers(num_layers, stages)]
    return [["embedding", *layout[0]], *layout[1:-1], [*layout[-1], "loss"]]


def _implementation(config: Config, architecture: Architecture) -> dict[str, Any]:
    dtype = torch.bfloat16 if config.model.dtype == "bf16" else torch.float32
    engine = uses_transformer_engine(config.model)
    return dict(
        transformer_impl="transformer_engine" if engine else "local",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=not torch.cuda.is_available(),
        attention_softmax_in_fp32=True,
        moe_grouped_gemm=engine,
        bias_activation_fusion=engine,
        bias_dropout_fusion=engine,
        apply_rope_fusion=engine and not architecture.latent_attention,
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
