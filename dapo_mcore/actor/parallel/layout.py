"""The mesh of processes: where this rank stands, and which ranks it talks to.

Change here: how processes are started and grouped. No other module reads Megatron's parallel_state or
the launcher's environment variables.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from dapo_mcore.actor.parallel import cpu_device
from dapo_mcore.actor.parallel.megatron_version import check_version
from dapo_mcore.actor.parallel.mesh import data_parallel_size, expert_data_parallel_size
from dapo_mcore.config.sections import ParallelConfig
from dapo_mcore.errors import OtherRankFailed
from dapo_mcore.process.launcher import check_launcher

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """This rank's coordinates and groups. Rank 0 is the controller: first in every direction of the mesh.

    tensor, pipeline, context, data          sizes of the mesh's axes; world_size is their product
    expert_tensor, expert, expert_data       sizes of the experts' own axes; world_size is their product times pipeline
    *_rank                                   this rank's coordinate on each axis
    tensor_group, pipeline_group,            device process groups
    expert_tensor_group, expert_group
    copies_group, expert_copies_group        device process groups of the ranks that hold the same shards as this one: data-
                                             and context-parallel, and for experts expert-data-parallel
    control_group                            gloo group of all ranks, for tensors in host memory
    replica_groups                           gloo; entry d holds rank 0 and every rank of data-parallel replica d, and is
                                             None where this rank is not in it
    """

    rank: int
    world_size: int
    device: torch.device
    tensor: int
    pipeline: int
    context: int
    data: int
    expert_tensor: int
    expert: int
    expert_data: int
    tensor_rank: int
    pipeline_rank: int
    context_rank: int
    data_rank: int
    expert_tensor_rank: int
    expert_rank: int
    expert_data_rank: int
    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    expert_tensor_group: dist.ProcessGroup
    expert_group: dist.ProcessGroup
    copies_group: dist.ProcessGroup
    expert_copies_group: dist.ProcessGroup
    control_group: dist.ProcessGroup
    replica_groups: tuple[dist.ProcessGroup | None, ...]

    @property
    def is_controller(self) -> bool:
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline - 1

    @property
    def reports_loss(self) -> bool:
        """True on exactly one rank of each (data, context) coordinate: its loss rows count once in a sum over ranks."""
        return self.is_last_stage and self.tensor_rank == 0

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """The elementwise sum of host tensors over all ranks (gloo all-reduce); in place."""
        dist.all_reduce(values, group=self.control_group)
        return values

    def max_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """The elementwise maximum of host tensors over all ranks (gloo all-reduce); in place."""
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.control_group)
        return values

    def broadcast_object(self, value: object) -> object:
        """Rank 0's value on every rank (gloo broadcast); small records within the trusted job only."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control_group)
        return box[0]

    def broadcast(self, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """Rank 0's host tensor on every rank of a gloo `group`; in place."""
        dist.broadcast(tensor, src=0, group=group)
        return tensor

    def barrier(self) -> None:
        dist.barrier(group=self.control_group)

    def on_controller_or_raise(self, action: Callable[[], T]) -> T:
        """What `action` returns on this rank. When it fails on rank 0 every rank raises, so that none waits for it.

        Every rank calls `action`; where only rank 0 has something to do, the others' returns None at once. Raises
        OtherRankFailed with rank 0's message elsewhere. Collective: one gloo broadcast over the control group.
        """
        result, problem = None, None
        try:
            result = action()
        except Exception as error:
            if not self.is_controller:
                raise
            problem = error
        told = self.broadcast_object(None if problem is None else str(problem) or repr(problem))
        if problem is not None:
            raise problem
        if told is not None:
            raise OtherRankFailed(f"rank 0 failed: {told}")
        return result

    def on_every_rank_or_raise(self, action: Callable[[], T]) -> T:
        """Return what `action` returns on this rank. When it fails on any rank every rank raises, so that none waits for it.

        Raises OtherRankFailed with the first failed rank's message where `action` went well. Collective: one gloo
        all-gather over the control group.
        """
        result, problem = None, None
        try:
            result = action()
        except Exception as error:
            problem = error
        told: list[str | None] = [None] * self.world_size
        mine = None if problem is None else str(problem) or repr(problem)
        dist.all_gather_object(told, mine, group=self.control_group)
        if problem is not None:
            raise problem
        for rank, text in enumerate(told):
            if text is not None:
                raise OtherRankFailed(f"rank {rank} failed: {text}")
        return result

    def gather_objects(self, value: object) -> list[object]:
        """Return every rank's value on rank 0, in rank order, and nothing elsewhere (gloo gather); small records only."""
        found = [None] * self.world_size if self.is_controller else None
        dist.gather_object(value, found, dst=0, group=self.control_group)
        return found or []

    def free_scratch(self) -> None:
        """Returns to the device what Megatron and torch keep for reuse. No communication."""
        from megatron.core import parallel_state

        parallel_state.get_global_memory_buffer().buffer.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def num_local_ranks() -> int:
    """Processes of the job on this machine; 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_beside_rank_0() -> bool:
    """Return True if torchrun says that this rank is on the machine of rank 0."""
    return os.environ.get("GROUP_RANK") == "0"


def start(parallel: ParallelConfig, seed: int) -> Layout:
    """Joins the job and builds every process group.

    Reads RANK and WORLD_SIZE (torchrun); without them this is a job of one process. Raises ConfigError when a launcher's
    variables make no job, when the world size does not fit the mesh, and when megatron-core's version is not one that runs.
    Collectives: creates process groups, so every rank must call it.
    """
    check_launcher(os.environ)
    check_version()
    cpu_device.install_if_needed()
    from megatron.core import parallel_state, tensor_parallel

    device = _join(parallel)
    data = data_parallel_size(parallel, dist.get_world_size())
    expert_data = expert_data_parallel_size(parallel, dist.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_parallel,
        pipeline_model_parallel_size=parallel.pipeline_parallel,
        context_parallel_size=parallel.context_parallel,
        expert_model_parallel_size=parallel.expert_parallel,
        expert_tensor_parallel_size=parallel.expert_tensor_size,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=parallel.timeout_minutes,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 1)
    data_rank = parallel_state.get_data_parallel_rank()
    timeout = timedelta(minutes=parallel.timeout_minutes)
    control = dist.new_group(backend="gloo", timeout=timeout)
    return Layout(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=device,
        tensor=parallel.tensor_parallel,
        pipeline=parallel.pipeline_parallel,
        context=parallel.context_parallel,
        data=data,
        expert_tensor=parallel.expert_tensor_size,
        expert=parallel.expert_parallel,
        expert_data=expert_data,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        context_rank=parallel_state.get_context_parallel_rank(),
        data_rank=data_rank,
        expert_tensor_rank=parallel_state.get_expert_tensor_parallel_rank(),
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
        expert_data_rank=parallel_state.get_expert_data_parallel_rank(),
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
        expert_tensor_group=parallel_state.get_expert_tensor_parallel_group(),
        expert_group=parallel_state.get_expert_model_parallel_group(),
        copies_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        expert_copies_group=parallel_state.get_expert_data_parallel_group(),
        control_group=control,
        replica_groups=_replica_groups(data, data_rank, control, timeout),
    )


def stop() -> None:
    """Leaves the job; safe to call twice."""
    from megatron.core import parallel_state

    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _join(parallel: ParallelConfig) -> torch.device:
    timeout = timedelta(minutes=parallel.timeout_minutes)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if dist.is_initialized():
        return device
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return device


def _replica_groups(
    data: int, data_rank: int, control: dist.ProcessGroup, timeout: timedelta
) -> tuple[dist.ProcessGroup | None, ...]:
    """One gloo group a data-parallel replica, each with rank 0 added. Every rank creates all of them, in one order."""
    ranks_of = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    ranks_of[dist.get_rank()] = data_rank
    dist.all_reduce(ranks_of, group=control)
    groups = []
    for replica in range(data):
        members = sorted({0, *torch.nonzero(ranks_of == replica).flatten().tolist()})
        group = dist.new_group(members, backend="gloo", timeout=timeout)
        groups.append(group if dist.get_rank() in members else None)
    return tuple(groups)
