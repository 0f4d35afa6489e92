"""The parallel layout: this rank's coordinates, its process groups, and the small collectives of the control group.

Change here: how processes are started and grouped. No other module of actor/ reads Megatron's parallel_state or the
launcher's environment variables.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from dapo_mcore.actor.parallel import cpu_device
from dapo_mcore.actor.parallel.megatron_version import check_version
from dapo_mcore.actor.parallel.mesh import data_parallel_size, expert_data_parallel_size
from dapo_mcore.config.parallel import ParallelConfig
from dapo_mcore.errors import OtherRankFailed
from dapo_mcore.process.attempt import call_roll
from dapo_mcore.process.beacon import NullBeacon
from dapo_mcore.process.launcher import check_launcher

T = TypeVar("T")

_JOIN = timedelta(minutes=30)
"""All ranks begin at once, and only imports from a slow disk come before they join."""


@dataclass(frozen=True)
class Layout:
    """This rank's coordinates and process groups. Rank 0 is the controller, with coordinate 0 on every axis.

    tensor, pipeline, context, data          sizes of the parallel axes; world_size is their product
    expert_tensor, expert, expert_data       sizes of the experts' axes; world_size is their product times pipeline
    *_rank                                   this rank's coordinate on each axis
    tensor_group, pipeline_group,            device process groups
    context_group
    expert_tensor_group, expert_group
    copies_group, expert_copies_group        device process groups of the ranks that hold the same shards as this rank: its
                                             data- and context-parallel ranks, and for experts its expert-data-parallel ranks
    control_group                            gloo group of all ranks, for tensors in host memory
    replica_groups                           gloo groups: entry d contains rank 0 and all ranks of data-parallel replica d; it
                                             is None on ranks that are not in it
    beacon                                   tells the watchdog what this rank does
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
    context_group: dist.ProcessGroup
    expert_tensor_group: dist.ProcessGroup
    expert_group: dist.ProcessGroup
    copies_group: dist.ProcessGroup
    expert_copies_group: dist.ProcessGroup
    control_group: dist.ProcessGroup
    replica_groups: tuple[dist.ProcessGroup | None, ...]
    beacon: NullBeacon

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
        """Return True on exactly one rank per (data, context) coordinate, so each loss row counts once in a sum over ranks."""
        return self.is_last_stage and self.tensor_rank == 0

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Return the elementwise sum of host tensors over all ranks, in place. Collective: gloo all-reduce."""
        with self.beacon.waits("sum"):
            dist.all_reduce(values, group=self.control_group)
        return values

    def max_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Return the elementwise maximum of host tensors over all ranks, in place. Collective: gloo all-reduce."""
        with self.beacon.waits("maximum"):
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.control_group)
        return values

    def broadcast_object(self, value: object) -> object:
        """Return rank 0's value on every rank; only for small records, within the trusted job. Collective: gloo broadcast."""
        box = [value]
        with self.beacon.waits("broadcast"):
            dist.broadcast_object_list(box, src=0, group=self.control_group)
        return box[0]

    def broadcast(self, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """Return rank 0's host tensor on every rank of a gloo `group`, in place. Collective: gloo broadcast."""
        with self.beacon.waits("broadcast") if group is self.control_group else nullcontext():
            dist.broadcast(tensor, src=0, group=group)
        return tensor

    def barrier(self) -> None:
        """Wait until all ranks are here. Collective: gloo barrier over the control group."""
        with self.beacon.waits("barrier"):
            dist.barrier(group=self.control_group)

    def on_controller_or_raise(self, action: Callable[[], T]) -> T:
        """Call `action` and return its result. If it fails on rank 0, every rank raises, so no rank waits for rank 0.

        Every rank calls `action`; if only rank 0 has something to do, the other ranks' action returns None at once. If rank 0
        fails, other ranks raise OtherRankFailed with its message. Collective: one gloo broadcast over the control group.
        """
        result, failure = None, None
        try:
            result = action()
        except Exception as error:
            if not self.is_controller:
                raise
            failure = error
        message = self.broadcast_object(_message(failure))
        if failure is not None:
            raise failure
        if message is not None:
            raise OtherRankFailed(f"rank 0 failed: {message}")
        return result

    def on_every_rank_or_raise(self, action: Callable[[], T]) -> T:
        """Call `action` and return its result. If it fails on any rank, every rank raises, so no rank waits for another.

        Ranks on which it succeeded raise OtherRankFailed with the message of the first failed rank. Collective: one gloo
        all-gather over the control group.
        """
        result, failure = None, None
        try:
            result = action()
        except Exception as error:
            failure = error
        messages = self.share_objects(_message(failure))
        if failure is not None:
            raise failure
        for rank, message in enumerate(messages):
            if message is not None:
                raise OtherRankFailed(f"rank {rank} failed: {message}")
        return result

    def share_objects(self, value: T) -> list[T]:
        """Return every rank's value on every rank, in rank order; for small records. Collective: gloo all-gather."""
        values: list[T] = [value] * self.world_size
        with self.beacon.waits("all-gather"):
            dist.all_gather_object(values, value, group=self.control_group)
        return values

    def gather_objects(self, value: object) -> list[object]:
        """Return every rank's value on rank 0, in rank order, and [] elsewhere; for small records. Collective: gloo gather."""
        values = [None] * self.world_size if self.is_controller else None
        with self.beacon.waits("gather"):
            dist.gather_object(value, values, dst=0, group=self.control_group)
        return values or []

    def first_ranks_of_nodes(self) -> list[int]:
        """Return the first rank of each node, on every rank. Collective: gloo all-gather over the control group."""
        return [rank for rank, is_first in enumerate(self.share_objects(is_first_of_node())) if is_first]

    def free_scratch(self) -> None:
        """Free the device memory that Megatron and torch keep for reuse. No communication."""
        from megatron.core import parallel_state

        parallel_state.get_global_memory_buffer().buffer.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _message(failure: Exception | None) -> str | None:
    return None if failure is None else str(failure) or repr(failure)


def num_local_ranks() -> int:
    """Return the number of the job's processes on this machine; 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_first_of_node() -> bool:
    """Return True on one of the job's processes on each machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def start(
    parallel: ParallelConfig, seed: int, new_beacon: Callable[[str], NullBeacon] = lambda _: NullBeacon()
) -> Layout:
    """Join the job, build every process group and return this rank's layout.

    new_beacon  gets the name of this attempt of the job, once all ranks have joined.
    Reads RANK and WORLD_SIZE (torchrun); without them this is a job of one process. Raises ConfigError if the launcher's
    variables do not describe a job, if the world size does not fit the `parallel` section, or if this version of megatron-core
    is not supported. Collectives: creates process groups, so every rank must call it.
    """
    check_launcher(os.environ)
    check_version()
    cpu_device.install_if_needed()
    from megatron.core import parallel_state, tensor_parallel

    device, beacon = _join(parallel, new_beacon)
    data = data_parallel_size(parallel, dist.get_world_size())
    expert_data = expert_data_parallel_size(parallel, dist.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_parallel,
        pipeline_model_parallel_size=parallel.pipeline_parallel,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_size,
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
        context_group=parallel_state.get_context_parallel_group(),
        expert_tensor_group=parallel_state.get_expert_tensor_parallel_group(),
        expert_group=parallel_state.get_expert_model_parallel_group(),
        copies_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        expert_copies_group=parallel_state.get_expert_data_parallel_group(),
        control_group=control,
        replica_groups=_replica_groups(data, data_rank, control, timeout),
        beacon=beacon,
    )


def stop() -> None:
    """Leave the job. Safe to call twice."""
    from megatron.core import parallel_state

    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _join(parallel: ParallelConfig, new_beacon: Callable[[str], NullBeacon]) -> tuple[torch.device, NullBeacon]:
    timeout = timedelta(minutes=parallel.timeout_minutes)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if dist.is_initialized():
        return device, NullBeacon()
    if "WORLD_SIZE" in os.environ:
        join = min(timeout, _JOIN)
        store, rank, size = next(dist.rendezvous("env://", timeout=join))
        attempt = call_roll(store, rank, size, join.total_seconds())
        store.set_timeout(timeout)
        beacon = new_beacon(attempt)
        own = dist.PrefixStore(f"attempt/{attempt}", store)
        dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=timeout)
    else:
        beacon = NullBeacon()
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return device, beacon


def _replica_groups(
    data: int, data_rank: int, control: dist.ProcessGroup, timeout: timedelta
) -> tuple[dist.ProcessGroup | None, ...]:
    """Return one gloo group per data-parallel replica, plus rank 0 in each. Every rank creates all of them in the same order."""
    replica_of_rank = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    replica_of_rank[dist.get_rank()] = data_rank
    dist.all_reduce(replica_of_rank, group=control)
    groups = []
    for replica in range(data):
        members = sorted({0, *torch.nonzero(replica_of_rank == replica).flatten().tolist()})
        group = dist.new_group(members, backend="gloo", timeout=timeout)
        groups.append(group if dist.get_rank() in members else None)
    return tuple(groups)
