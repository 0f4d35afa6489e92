"""What is planned: a configuration and its model on the GPUs of a cluster.

Change here: which GPUs train and which generate, and how the mesh follows from their number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from dapo_mcore.actor.model.expert_rules import check_routing
from dapo_mcore.actor.model.fp8_rules import check_fp8_model
from dapo_mcore.actor.model.recompute import check_recompute
from dapo_mcore.actor.parallel.mesh import (
    check_mesh,
    data_parallel_size,
    expert_data_parallel_size,
    fewest_processes,
)
from dapo_mcore.actor.parallel.stages import split_layers
from dapo_mcore.architecture.flops import ForwardFlops, forward_flops
from dapo_mcore.architecture.reader import Architecture, read_architecture
from dapo_mcore.architecture.shape import WeightShape, padded_vocab_size, weight_shape
from dapo_mcore.config.parallel import ParallelConfig
from dapo_mcore.config.schema import Config
from dapo_mcore.errors import ConfigError
from dapo_mcore.plan.hardware import GPUS, Assumptions, Gpu
from dapo_mcore.rollout.sglang.launch.servers import check_heads, check_node_gpus, check_shared_gpus

_FIRST, _LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
_UNREAD = (
    "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)


@dataclass(frozen=True)
class Cluster:
    """The machines. nodes 0: as many as the configuration needs."""

    gpu: Gpu = GPUS["h100"]
    gpus_per_node: int = 8
    nodes: int = 0


@dataclass(frozen=True)
class Job:
    """A run on a cluster.

    shape       of the whole model, with the vocabulary padded for this tensor parallelism
    num_train, num_servers   GPUs of training processes; GPUs of servers beside them (0 where both share)
    nodes       that hold them
    """

    config: Config
    architecture: Architecture
    shape: WeightShape
    flops: ForwardFlops
    cluster: Cluster
    assume: Assumptions
    num_train: int
    num_servers: int
    nodes: int

    @property
    def gpu(self) -> Gpu:
        return self.cluster.gpu

    @property
    def num_gpus(self) -> int:
        """GPUs that the run pays for: whole nodes."""
        return self.nodes * self.cluster.gpus_per_node

    @property
    def is_embedded(self) -> bool:
        """True if rank 0's process generates."""
        return self.config.rollout.engine == "embedded"

    @property
    def is_colocated(self) -> bool:
        """True if servers and trainer take turns on the same GPUs."""
        return not self.is_embedded and self.config.rollout.sglang.colocated

    @property
    def tensor(self) -> int:
        return self.config.parallel.tensor_parallel

    @property
    def pipeline(self) -> int:
        return self.config.parallel.pipeline_parallel

    @property
    def chunks(self) -> int:
        """Chunks of layers per pipeline stage."""
        return self.config.parallel.virtual_pipeline_parallel

    @property
    def context(self) -> int:
        return self.config.parallel.context_parallel

    @cached_property
    def data(self) -> int:
        """Data-parallel copies of the model."""
        return data_parallel_size(self.config.parallel, self.num_train)

    @cached_property
    def expert_data(self) -> int:
        """Copies of each expert."""
        return expert_data_parallel_size(self.config.parallel, self.num_train)

    @property
    def token_split(self) -> int:
        """Ranks over which norms and residuals divide the tokens of a context-parallel rank."""
        return self.tensor if self.config.parallel.sequence_parallel else 1

    @property
    def dtype_bytes(self) -> int:
        return 2 if self.config.model.dtype == "bf16" else 4

    @cached_property
    def stages(self) -> tuple[tuple[int, ...], ...]:
        """The layers of each pipeline stage, by their numbers in the model. Interleaved stages take chunks of layers in turn."""
        counts = _layers_of_chunks(self.config, self.shape.num_layers)
        ends = [sum(counts[: chunk + 1]) for chunk in range(len(counts))]
        chunks = [range(end - count, end) for end, count in zip(ends, counts)]
        return tuple(
            tuple(layer for chunk in chunks[stage :: self.pipeline] for layer in chunk)
            for stage in range(self.pipeline)
        )


def make_job(config: Config, hf_config: Any, cluster: Cluster, assume: Assumptions) -> Job:
    """Return the job. Raises ConfigError if the mesh does not fit the GPUs."""
    architecture = read_architecture(hf_config, config.longest_sequence)
    shape = weight_shape(hf_config, config.parallel.tensor_parallel)
    return place(config, architecture, shape, forward_flops(hf_config), cluster, assume)


def place(
    config: Config,
    architecture: Architecture,
    shape: WeightShape,
    flops: ForwardFlops,
    cluster: Cluster,
    assume: Assumptions,
    *,
    gpus: int = 0,
) -> Job:
    """Return the job of a configuration whose model has been read already. gpus 0: those of the cluster's nodes.

    Raises ConfigError if the model, the mesh or the servers do not fit each other or the GPUs.
    """
    _check_model(architecture, config)
    shape = replace(shape, padded_vocab_size=padded_vocab_size(shape.vocab_size, config.parallel.tensor_parallel))
    servers, shared, per_node = server_gpus(config), shared_gpus(config), cluster.gpus_per_node
    gpus = gpus or cluster.nodes * per_node or _fewest_ranks(config.parallel, shared) + servers
    num_train, nodes = gpus - servers, -(-gpus // per_node)
    if num_train < 1:
        raise ConfigError(
            f"rollout.sglang.num_servers {config.rollout.sglang.num_servers} × tensor_parallel "
            f"{config.rollout.sglang.tensor_parallel} = {servers} GPUs leave none of {gpus} for training; give more "
            "--nodes, fewer servers, or set rollout.sglang.colocated true"
        )
    job = Job(config, architecture, shape, flops, cluster, assume, num_train, servers, nodes)
    _ = (job.data, job.expert_data, job.stages)  # their errors
    if config.rollout.engine == "sglang":
        check_shared_gpus(config.rollout.sglang, num_train)
        check_node_gpus(config.rollout.sglang, per_node)
    return job


def server_gpus(config: Config) -> int:
    """Return the GPUs of servers that no training process uses."""
    return 0 if config.rollout.sglang.colocated else _all_server_gpus(config)


def shared_gpus(config: Config) -> int:
    """Return the GPUs of servers that training processes use, too."""
    return _all_server_gpus(config) if config.rollout.sglang.colocated else 0


def _all_server_gpus(config: Config) -> int:
    servers = config.rollout.sglang
    on_gpus = config.rollout.engine == "sglang" and servers.device == "cuda"
    return servers.num_gpus if on_gpus else 0


def _fewest_ranks(parallel: ParallelConfig, shared: int) -> int:
    """Return the fewest ranks that the mesh allows, with a GPU for each that servers share unless data_parallel is given."""
    ranks = fewest_processes(parallel)
    return ranks if parallel.data_parallel else max(1, -(-shared // ranks)) * ranks


def _check_model(architecture: Architecture, config: Config) -> None:
    check_mesh(architecture, config.parallel)
    check_fp8_model(architecture, config.model, config.parallel)
    check_recompute(architecture, config.model, engine=config.model.transformer_impl != "local")
    check_routing(architecture, config.model, config.megatron)
    if config.rollout.engine == "sglang":
        check_heads(config.rollout.sglang, architecture.fields["num_attention_heads"])


def _layers_of_chunks(config: Config, num_layers: int) -> list[int]:
    """Return the number of layers of each chunk, in the model's order; without interleaving a chunk is a stage."""
    stages, chosen = config.parallel.num_chunks, config.megatron
    if unread := [name for name in _UNREAD if chosen.get(name)]:
        raise ConfigError(f"plan does not read megatron.{unread[0]}; leave it out here, or use {_FIRST} and {_LAST}")
    ends = {0: chosen.get(_FIRST), stages - 1: chosen.get(_LAST)}
    if any(ends.values()) and stages > config.parallel.pipeline_parallel:
        raise ConfigError(
            f"plan reads megatron.{_FIRST} and {_LAST} only without virtual_pipeline_parallel; leave them out"
        )
    fixed = {stage: count for stage, count in ends.items() if count}
    if not fixed:
        return split_layers(num_layers, stages)
    rest = [stage for stage in range(stages) if stage not in fixed]
    left = num_layers - sum(fixed.values())
    if left < len(rest) or (left % len(rest) if rest else left):
        raise ConfigError(f"{_FIRST} and {_LAST} leave {left} of {num_layers} layers for {len(rest)} stages")
    return [fixed.get(stage, left // max(1, len(rest))) for stage in range(stages)]
