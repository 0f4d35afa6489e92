"""The stream of HF-named weights out of a sharded actor: export writes it to files, rollout engines load it.

Change here: how shards travel to rank 0. Each shard travels once, straight to rank 0, many small ones in one message (a
parcel); while the tensors of a parcel are used, the shards of the next one are on their way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
import torch.distributed as dist

from dapo_mcore.actor.model.policy import PolicyModel
from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.architecture.mapping import Parameter, export_parameter, find_parameter, local_shape
from dapo_mcore.architecture.shape import WeightShape
from dapo_mcore.types import Empty

PARCEL_BYTES = 32 << 20
"""Of all shards together: large enough that messages cost little beside their bytes, small beside a bucket."""


@dataclass(frozen=True)
class Content:
    """A parameter of the stream: `holders` have one shard of `shard_shape` each, in order, in `dtype`."""

    name: str
    parameter: Parameter
    holders: tuple[int, ...]
    shard_shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def shard_size(self) -> int:
        return math.prod(self.shard_shape)

    @property
    def nbytes(self) -> int:
        return self.shard_size * self.dtype.itemsize * len(self.holders)

    @property
    def is_stacked(self) -> bool:
        """Whether its shards, one below the other, are the HF tensor (and vocabulary padding) already."""
        return self.parameter.rule.tp_split == "rows" and self.parameter.rule.merge == "one"


Parcel = tuple[Content, ...]
"""Parameters with the same holders and dtype, which travel together."""


class WeightStream:
    """Calling it yields (HF name, full tensor) on rank 0 and nothing elsewhere; every rank must drain it.

    A tensor is a parameter of the actor or has memory of its own: it keeps its value until the actor's weights change.
    Extra memory on rank 0, beside the tensors that are kept: two parcels (of PARCEL_BYTES or the largest parameter).
    `empty` makes the memory of large vocabulary matrices that come from other ranks.
    Communication: one message per parcel from each of its holders to rank 0. Building it: an all-gather of names.
    """

    def __init__(self, policy: PolicyModel, shape: WeightShape, layout: Layout, parcel_bytes: int = PARCEL_BYTES):
        self.shape = shape
        self.layout = layout
        names = policy.global_parameter_names()
        local = {names[name]: weight for name, weight in policy.named_weights()}
        if shape.tied and not layout.is_first_stage:
            local.pop("output_layer.weight", None)
        self.dtype = policy.config.params_dtype
        self.local = {name: tensor for name, tensor in local.items() if self._is_needed(name)}
        self.plan = [parcel for run in self._runs() for parcel in _parcels(run, parcel_bytes)]

    def __call__(self, empty: Empty = torch.empty) -> Iterator[tuple[str, torch.Tensor]]:
        if not self.layout.is_controller:
            self._send()
            return
        coming = self._receive(self.plan[0], empty)
        for parcel, following in pairwise((*self.plan, ())):
            shards, works = coming
            coming = self._receive(following, empty)
            while works:  # a work that is kept keeps its message
                works.pop(0).wait()
            yield from self._exported(parcel, shards)

    def _is_needed(self, name: str) -> bool:
        """Whether this rank's shard is in the stream: of each replica the first, of uncut parameters one copy."""
        layout, rule = self.layout, find_parameter(name, self.shape).rule
        tensor_rank = layout.expert_tensor_rank if rule.per_expert else layout.tensor_rank
        first = layout.expert_data_rank == 0 if rule.per_expert else layout.data_rank == layout.context_rank == 0
        return first and (rule.tp_split is not None or tensor_rank == 0)

    def _runs(self) -> Iterator[list[Content]]:
        """All parameters, in runs of the same holders and dtype; pipeline stages come in turn."""
        everyone: list[list[str]] = [[] for _ in range(self.layout.world_size)]
        dist.all_gather_object(everyone, list(self.local), group=self.layout.control_group)
        holders: dict[str, tuple[int, ...]] = {}
        for rank, names in enumerate(everyone):  # ranks ascend with the tensor-parallel coordinate
            for name in names:
                holders[name] = (*holders.get(name, ()), rank)
        contents = [self._content(name, ranks) for name, ranks in holders.items()]
        # a stable sort, so that norms, which only one rank sends, do not part the matrices around them
        for _, run in groupby(sorted(contents, key=_way), key=_way):
            yield list(run)

    def _content(self, name: str, holders: tuple[int, ...]) -> Content:
        parameter = find_parameter(name, self.shape)
        dtype = torch.float32 if parameter.rule.float32 else self.dtype
        return Content(name, parameter, holders, local_shape(parameter, self.shape, len(holders)), dtype)

    def _send(self) -> None:
        """All of this rank's messages, two on their way at a time."""
        sent: list[tuple[dist.Work, torch.Tensor]] = []
        for parcel in self.plan:
            if self.layout.rank in parcel[0].holders:
                message = _flat([self.local[content.name].detach() for content in parcel])
                sent.append((dist.isend(message, 0), message))
            if len(sent) > 1:
                sent.pop(0)[0].wait()
        for work, _ in sent:
            work.wait()

    def _receive(self, parcel: Parcel, empty: Empty) -> tuple[list[list[torch.Tensor]], list[dist.Work]]:
        """Each parameter's shards, as they will be when the returned works are done."""
        if not parcel:
            return [], []
        holders, size = parcel[0].holders, sum(content.shard_size for content in parcel)
        if len(parcel) == 1 and parcel[0].is_stacked and holders != (self.layout.rank,):
            return self._receive_stacked(parcel[0], empty)
        shards, works = [[] for _ in parcel], []
        for holder in holders:
            if holder == self.layout.rank:
                parts = [self.local[content.name].detach() for content in parcel]
            else:
                message = torch.empty(size, dtype=parcel[0].dtype, device=self.layout.device)
                works.append(dist.irecv(message, holder))
                parts = message.split([content.shard_size for content in parcel])
            for own, part, content in zip(shards, parts, parcel, strict=True):
                own.append(part.view(content.shard_shape))
        return shards, works

    def _receive_stacked(self, content: Content, empty: Empty) -> tuple[list[list[torch.Tensor]], list[dist.Work]]:
        """Of a large vocabulary matrix: the shards land where they belong in the whole, which is the only shard then."""
        rows, *others = content.shard_shape
        whole = empty((rows * len(content.holders), *others), dtype=content.dtype, device=self.layout.device)
        works = []
        for holder, part in zip(content.holders, whole.split(rows), strict=True):
            if holder == self.layout.rank:
                part.copy_(self.local[content.name].detach())
            else:
                works.append(dist.irecv(part, holder))
        return [[whole]], works

    def _exported(self, parcel: Parcel, shards: list[list[torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for content in parcel:
            yield from export_parameter(content.parameter, shards.pop(0), self.shape)


def _way(content: Content) -> tuple[tuple[int, ...], str]:
    return content.holders, str(content.dtype)


def _parcels(run: list[Content], limit: int) -> Iterator[Parcel]:
    """The run in pieces of at most `limit` bytes; a larger parameter makes one of its own."""
    current: Parcel = ()
    for content in run:
        if current and sum(other.nbytes for other in current) + content.nbytes > limit:
            yield current
            current = ()
        current += (content,)
    yield current


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    """One message; a single tensor is not copied."""
    return tensors[0].reshape(-1) if len(tensors) == 1 else torch.cat([tensor.reshape(-1) for tensor in tensors])
