"""The stream of HF-named weights out of a sharded actor: export writes it to files, rollout engines load it.

Change here: how shards travel to rank 0. One parameter is in flight at a time, so the extra memory on rank 0 is that of the
largest full tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from dapo_mcore.actor.layout import Layout
from dapo_mcore.actor.model import PolicyModel
from dapo_mcore.types import RolloutEngine
from dapo_mcore.weights.mapping import Rule, WeightShape, find_rule, join_shards, split_parameter


class WeightStream:
    """Calling it yields (HF name, full tensor) on rank 0 and nothing elsewhere; every rank must drain it.

    Collectives: per parameter, an all-gather over the tensor-parallel group and a send from the owning pipeline stage
    to stage 0. Only the ranks of the first data- and context-parallel coordinate take part.
    """

    def __init__(self, policy: PolicyModel, shape: WeightShape, layout: Layout):
        self.shape = shape
        self.layout = layout
        names = policy.global_parameter_names()
        self.local = {names[name]: parameter for name, parameter in policy.named_parameters()}
        self.stages = self._gather_names()

    def __call__(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self.layout.data_rank or self.layout.context_rank:
            return
        for stage, names in enumerate(self.stages):
            for name in names:
                if name == "output_layer.weight" and self.shape.tied:
                    continue
                yield from self._collect(name, stage)

    def _gather_names(self) -> list[list[str]]:
        """Parameter names of each pipeline stage, in order."""
        stages: list[list[str]] = [[] for _ in range(self.layout.pipeline)]
        dist.all_gather_object(stages, list(self.local), group=self.layout.pipeline_group)
        return stages

    def _collect(self, name: str, stage: int) -> Iterator[tuple[str, torch.Tensor]]:
        rule, layer = find_rule(name, self.shape.tied)
        if self.layout.pipeline_rank == stage:
            parameter = self.local[name].detach()
            for hf_name, shard in split_parameter(rule, layer, parameter, self.shape):
                full = self._join(rule, shard)
                if stage == 0 and self.layout.tensor_rank == 0:
                    yield hf_name, full
                elif self.layout.tensor_rank == 0:
                    self._send(full)
        elif self.layout.pipeline_rank == 0 and self.layout.tensor_rank == 0:
            for hf_name in rule.hf:
                yield hf_name.format(layer=layer), self._receive(stage)

    def _join(self, rule: Rule, shard: torch.Tensor) -> torch.Tensor:
        if rule.dim is None or self.layout.tensor == 1:
            return join_shards(rule, [shard], self.shape)
        shards = [torch.empty_like(shard) for _ in range(self.layout.tensor)]
        dist.all_gather(shards, shard.contiguous(), group=self.layout.tensor_group)
        return join_shards(rule, shards, self.shape)

    def _send(self, tensor: torch.Tensor) -> None:
        first = self.layout.pipeline_ranks[0]
        size = torch.tensor([*tensor.shape, *[0] * (2 - tensor.dim())], device=tensor.device)
        dist.send(size, first, group=self.layout.pipeline_group)
        dist.send(tensor.contiguous(), first, group=self.layout.pipeline_group)

    def _receive(self, stage: int) -> torch.Tensor:
        owner, some = self.layout.pipeline_ranks[stage], next(iter(self.local.values()))
        size = torch.empty(2, dtype=torch.int64, device=some.device)
        dist.recv(size, owner, group=self.layout.pipeline_group)
        tensor = torch.empty([n for n in size.tolist() if n], dtype=some.dtype, device=some.device)
        dist.recv(tensor, owner, group=self.layout.pipeline_group)
        return tensor


def sync_weights(stream: WeightStream, engine: RolloutEngine | None, version: int) -> None:
    """Gives the engine on rank 0 the actor's current weights as `version`. Every rank must call it."""
    if engine is not None:
        engine.update_weights(stream(), version)
        return
    for _ in stream():
        pass
