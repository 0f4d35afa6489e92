"""The stream of HF-named weights out of a sharded actor: export writes it to files, rollout engines load it.

Change here: how shards travel to rank 0. One parameter is in flight at a time, so the extra memory on rank 0 is about twice
that of the largest parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist

from dapo_mcore.actor.layout import Layout
from dapo_mcore.actor.model import PolicyModel
from dapo_mcore.types import RolloutEngine
from dapo_mcore.weights.mapping import Parameter, export_parameter, find_parameter, hf_shapes
from dapo_mcore.weights.shape import WeightShape


class Item(NamedTuple):
    """A parameter of the stream and the rank that has it whole after the gathering."""

    name: str
    owner: int


class WeightStream:
    """Calling it yields (HF name, full tensor) on rank 0 and nothing elsewhere; every rank must drain it.

    Collectives: per parameter, an all-gather over the (expert-)tensor-parallel group of one replica, and a send from that
    group's first rank to rank 0. Building it: an all-gather of names over all ranks.
    """

    def __init__(self, policy: PolicyModel, shape: WeightShape, layout: Layout):
        self.shape = shape
        self.layout = layout
        names = policy.global_parameter_names()
        local = {names[name]: weight for name, weight in policy.named_weights()}
        if shape.tied and not layout.is_first_stage:
            local.pop("output_layer.weight", None)
        self.dtype = policy.config.params_dtype
        self.local = {name: tensor for name, tensor in local.items() if self._in_first_replica(name)}
        self.plan = self._gather_plan()

    def __call__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for item in self.plan:
            if item.name in self.local:
                yield from self._give(item)
            if self.layout.is_controller and item.owner != 0:
                yield from self._receive(item)

    def _of_expert(self, name: str) -> bool:
        return find_parameter(name, self.shape).rule.of_expert

    def _in_first_replica(self, name: str) -> bool:
        layout = self.layout
        if self._of_expert(name):
            return layout.expert_data_rank == 0
        return layout.data_rank == 0 and layout.context_rank == 0

    def _is_owner(self, name: str) -> bool:
        return (self.layout.expert_tensor_rank if self._of_expert(name) else self.layout.tensor_rank) == 0

    def _gather_plan(self) -> list[Item]:
        """What is sent by whom, in the order of ranks: pipeline stages, and within them experts, come in turn."""
        everyone: list[list[str]] = [[] for _ in range(self.layout.world_size)]
        mine = [name for name in self.local if self._is_owner(name)]
        dist.all_gather_object(everyone, mine, group=self.layout.control_group)
        return [Item(name, rank) for rank, names in enumerate(everyone) for name in names]

    def _give(self, item: Item) -> Iterator[tuple[str, torch.Tensor]]:
        parameter = find_parameter(item.name, self.shape)
        shards = self._gather(parameter, self.local[item.name].detach())
        if item.owner != self.layout.rank:
            return
        for name, tensor in export_parameter(parameter, shards, self.shape):
            if self.layout.is_controller:
                yield name, tensor
            else:
                dist.send(tensor.contiguous(), 0)

    def _gather(self, parameter: Parameter, shard: torch.Tensor) -> list[torch.Tensor]:
        of_expert, layout = parameter.rule.of_expert, self.layout
        size = layout.expert_tensor if of_expert else layout.tensor
        if parameter.rule.cut is None or size == 1:
            return [shard]
        group = layout.expert_tensor_group if of_expert else layout.tensor_group
        shards = [torch.empty_like(shard) for _ in range(size)]
        dist.all_gather(shards, shard.contiguous(), group=group)
        return shards

    def _receive(self, item: Item) -> Iterator[tuple[str, torch.Tensor]]:
        parameter = find_parameter(item.name, self.shape)
        dtype = torch.float32 if parameter.rule.float32 else self.dtype
        for name, size in zip(parameter.hf, hf_shapes(parameter, self.shape), strict=True):
            tensor = torch.empty(size, dtype=dtype, device=self.layout.device)
            dist.recv(tensor, item.owner)
            yield name, tensor


def sync_weights(stream: WeightStream, engine: RolloutEngine | None, version: int) -> None:
    """Gives the engine on rank 0 the actor's current weights as `version`. Every rank must call it."""
    if engine is not None:
        engine.update_weights(stream(), version)
        return
    for _ in stream():
        pass
