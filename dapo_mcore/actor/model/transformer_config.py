"""Megatron's TransformerConfig, from the model, the parallel layout, the layer implementations and the user's own fields.

Change here: the options of Megatron that this project decides: precision, fusions, stages. The sections `model.fp8` and
`model.recompute` have modules of their own; megatron_fields.py lists the options that a user may set, mesh.py the rules of the
parallel layout.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from dapo_mcore.actor.model import expert_rules, fp8_rules, recompute
from dapo_mcore.actor.model.layers import has_apex_accumulation, uses_transformer_engine
from dapo_mcore.actor.model.megatron_fields import check_fields
from dapo_mcore.actor.parallel.mesh import check_mesh
from dapo_mcore.actor.parallel.stages import split_layers
from dapo_mcore.architecture.reader import Architecture
from dapo_mcore.config.parallel import ParallelConfig
from dapo_mcore.config.schema import Config
from dapo_mcore.errors import ConfigError

_STAGE_FIELDS = (
    "pipeline_model_parallel_layout",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)

_OTHER_SWIGLU = ("activation_func_clamp_value", "glu_linear_offset", "use_te_activation_func")
"""Fields that change how a SwiGLU is computed; megatron-core refuses or ignores them with `bias_activation_fusion`."""


def transformer_config(config: Config, architecture: Architecture) -> TransformerConfig:
    """Return Megatron's config of the model.

    Raises ConfigError if the parallel layout does not fit the model, or if the `megatron` section sets a field that it may
    not set.
    """
    check_mesh(architecture, config.parallel)
    kind = MLATransformerConfig if architecture.latent_attention else TransformerConfig
    owned = owned_fields(config, architecture)
    engine = owned["transformer_impl"] == "transformer_engine"
    check_fields(config.megatron, engine=engine, owned=owned)
    _check_swiglu(config.megatron)
    fp8_rules.check_fp8(architecture, config.model, config.parallel, engine=engine)
    recompute.check_recompute(architecture, config.model, engine=engine)
    expert_rules.check_routing(architecture, config.model, config.megatron)
    chosen = config.megatron
    try:
        built = kind(**_defaults(architecture.num_layers, config.parallel.num_chunks, chosen) | owned | chosen)
        _check_stages(built, config.parallel)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"megatron-core refuses the configuration (megatron section: {chosen}): {error}") from error
    return built


def owned_fields(config: Config, architecture: Architecture) -> dict[str, Any]:
    """Return the fields that the model and the other sections decide; the `megatron` section may not set them."""
    return {
        **architecture.fields,
        **_mesh(config.parallel),
        **_precision(config.model.dtype),
        **_implementation(config, architecture),
        **recompute.megatron_fields(config.model.recompute),
        "moe_router_load_balancing_type": "none",
        "deterministic_mode": config.deterministic,
    }


def _other_swiglu(megatron: dict[str, Any]) -> list[str]:
    """Return the fields of the `megatron` section that need megatron-core's unfused SwiGLU in place of ours (swiglu.py)."""
    return [field for field in _OTHER_SWIGLU if megatron.get(field)]


def _check_swiglu(megatron: dict[str, Any]) -> None:
    if megatron.get("activation_func_fp8_input_store") and (others := _other_swiglu(megatron)):
        raise ConfigError(
            f"megatron.activation_func_fp8_input_store would change nothing: megatron.{others[0]} needs a SwiGLU that keeps "
            f"its input in full; leave one of them out"
        )


def _check_stages(built: TransformerConfig, parallel: ParallelConfig) -> None:
    """Raise ConfigError for pipeline stages that this project does not support, or that upstream would build wrong silently."""
    chunks = built.virtual_pipeline_model_parallel_size or 1
    if chunks != parallel.virtual_pipeline_parallel:
        raise ConfigError(
            f"megatron.pipeline_model_parallel_layout has {built.pipeline_model_parallel_size * chunks} parts, {chunks} per "
            f"pipeline stage, but parallel.virtual_pipeline_parallel is {parallel.virtual_pipeline_parallel}; set it to {chunks}"
        )
    if built.pipeline_model_parallel_layout is not None:
        return  # upstream checks it
    stages = range(built.pipeline_model_parallel_size)
    counts = [get_num_layers_to_build(built, chunk, stage) for chunk in range(chunks) for stage in stages]
    if sum(counts) != built.num_layers or min(counts) < 1:
        raise ConfigError(
            f"the megatron section spreads {built.num_layers} layers over pipeline stages as {counts}; every layer must "
            f"have a stage and every stage a layer"
        )


def _defaults(num_layers: int, num_chunks: int, chosen: dict[str, Any]) -> dict[str, Any]:
    """Return the fields whose values the `megatron` section may change."""
    # logits rounded to bf16 would choose other experts than the rollout engine does
    defaults: dict[str, Any] = dict(moe_router_dtype="fp32")
    # the lengths of micro-batches differ; with pipeline stages, upstream allows that only with `alltoall` and `flex`
    defaults["moe_token_dispatcher_type"] = "alltoall"
    if num_layers % num_chunks and not any(key in chosen for key in _STAGE_FIELDS):
        defaults["pipeline_model_parallel_layout"] = _pipeline_layout(num_layers, num_chunks)
    return defaults


def _mesh(parallel: ParallelConfig) -> dict[str, Any]:
    interleaved = parallel.virtual_pipeline_parallel > 1
    return dict(
        tensor_model_parallel_size=parallel.tensor_parallel,
        pipeline_model_parallel_size=parallel.pipeline_parallel,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_size,
        context_parallel_size=parallel.context_parallel,
        expert_model_parallel_size=parallel.expert_parallel,
        expert_tensor_parallel_size=parallel.expert_tensor_size,
        sequence_parallel=parallel.sequence_parallel,
        variable_seq_lengths=True,
        # interleaved stages send activations and gradients at once. In one batch, with variable lengths, they would wait for each
        # other for ever; so activations and gradients have calls of their own
        batch_p2p_comm=not interleaved,
        overlap_p2p_comm=interleaved,
        calculate_per_token_loss=True,
    )


def _pipeline_layout(num_layers: int, num_chunks: int) -> list[list[str]]:
    layout = [["decoder"] * count for count in split_layers(num_layers, num_chunks)]
    return [["embedding", *layout[0]], *layout[1:-1], [*layout[-1], "loss"]]


def _precision(name: str) -> dict[str, Any]:
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    return dict(params_dtype=dtype, pipeline_dtype=dtype, bf16=dtype == torch.bfloat16, attention_softmax_in_fp32=True)


def _implementation(config: Config, architecture: Architecture) -> dict[str, Any]:
    engine = uses_transformer_engine(config.model)
    fp8 = fp8_rules.megatron_fields(config.model.fp8, architecture.num_experts) if engine and config.model.fp8 else {}
    return fp8 | dict(
        transformer_impl="transformer_engine" if engine else "local",
        use_cpu_initialization=not torch.cuda.is_available(),
        moe_grouped_gemm=engine,
        bias_activation_fusion=not _other_swiglu(config.megatron),
        bias_dropout_fusion=engine,
        apply_rope_fusion=engine and not architecture.latent_attention,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=has_apex_accumulation() and not engine,  # Transformer Engine's layers need no apex
    )
