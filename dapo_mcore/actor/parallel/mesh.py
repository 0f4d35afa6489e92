"""The rules that the sizes of the parallel axes (the mesh) must fulfil, for the number of processes and for the model.

Change here: a rule about sizes. This module imports nothing slow, so the mesh can be checked before a run.
"""

from __future__ import annotations

import math
from typing import Any

from dapo_mcore.architecture.reader import Architecture
from dapo_mcore.config.parallel import ParallelConfig
from dapo_mcore.errors import ConfigError, listed


def fewest_processes(parallel: ParallelConfig) -> int:
    """Return the smallest number of processes that the mesh can use; it can use multiples of it too."""
    model = parallel.tensor_parallel * parallel.pipeline_parallel * parallel.context_parallel
    experts = parallel.expert_parallel * parallel.expert_tensor_size * parallel.pipeline_parallel
    return parallel.data_parallel * model if parallel.data_parallel else math.lcm(model, experts)


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Return the number of copies of the model. Raises ConfigError if the mesh does not use all processes."""
    tensor, pipeline, context = parallel.tensor_parallel, parallel.pipeline_parallel, parallel.context_parallel
    model = tensor * pipeline * context
    product = f"tensor_parallel {tensor} × pipeline_parallel {pipeline} × context_parallel {context}"
    if parallel.data_parallel is not None and world_size != model * parallel.data_parallel:
        raise ConfigError(
            f"world size {world_size} is not {product} × data_parallel {parallel.data_parallel} "
            f"= {model * parallel.data_parallel}; start {model * parallel.data_parallel} processes or change the mesh"
        )
    if world_size % model:
        raise ConfigError(
            f"world size {world_size} is not a multiple of {product} = {model}; "
            f"start {model} processes (or a multiple, for data parallelism), for instance "
            f"torchrun --nproc-per-node {model} -m dapo_mcore.train …"
        )
    return world_size // model


def expert_data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Return the number of copies of each expert. Raises ConfigError if the experts' mesh does not use all processes."""
    expert, tensor, pipeline = parallel.expert_parallel, parallel.expert_tensor_size, parallel.pipeline_parallel
    model = expert * tensor * pipeline
    if world_size % model:
        raise ConfigError(
            f"world size {world_size} is not a multiple of expert_parallel {expert} × expert_tensor_parallel {tensor} × "
            f"pipeline_parallel {pipeline} = {model}; start {model} processes (or a multiple), or lower "
            f"expert_parallel or expert_tensor_parallel"
        )
    return world_size // model


def check_mesh(architecture: Architecture, parallel: ParallelConfig) -> None:
    """Raise ConfigError if the mesh does not divide the model. A vocabulary need not divide: it is padded."""
    _check_tensor_parallel(architecture, parallel.tensor_parallel)
    latent = architecture.latent_attention
    if (latent or architecture.num_experts) and parallel.tensor_parallel > 1 and not parallel.sequence_parallel:
        raise ConfigError(
            f"tensor_parallel {parallel.tensor_parallel} with {'latent attention' if latent else 'experts'} needs "
            f"sequence_parallel: without it every rank would do the same work; set parallel.sequence_parallel true"
        )
    _check_pipeline(architecture.num_layers, parallel)
    if architecture.num_experts:
        _check_experts(architecture, parallel)
    elif parallel.expert_parallel > 1 or (parallel.expert_tensor_parallel or 1) > 1:
        raise ConfigError(
            f"{architecture.name} has no experts, so parallel.expert_parallel must be 1 (here {parallel.expert_parallel}) "
            f"and expert_tensor_parallel null or 1 (here {parallel.expert_tensor_parallel})"
        )


def _check_pipeline(num_layers: int, parallel: ParallelConfig) -> None:
    stages, chunks = parallel.pipeline_parallel, parallel.virtual_pipeline_parallel
    if parallel.num_chunks <= num_layers:
        return
    if chunks == 1:
        raise ConfigError(
            f"pipeline_parallel {stages} leaves stages empty: num_hidden_layers is {num_layers}; use at most {num_layers}"
        )
    raise ConfigError(
        f"pipeline_parallel {stages} × virtual_pipeline_parallel {chunks} = {stages * chunks} leaves chunks empty: "
        f"num_hidden_layers is {num_layers}; use a virtual_pipeline_parallel of at most {max(1, num_layers // stages)}"
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
    """Return the MLP widths that tensor parallelism splits, by their keys in config.json."""
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
