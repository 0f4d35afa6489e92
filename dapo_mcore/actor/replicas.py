"""Copies of one parameter on several ranks must stay equal, bit for bit: checksums find those that do not.

Change here: which ranks hold copies, and how copies are compared. Data- and context-parallel ranks hold the same shards,
tensor-parallel ranks the same norms, routers and latent projections, and the last pipeline stage a tied embedding again.
Nothing else would show that such copies have parted: exports and checkpoints take one of them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from dapo_mcore.actor.model.policy import PolicyModel
from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.architecture.mapping import find_parameter
from dapo_mcore.architecture.shape import WeightShape
from dapo_mcore.errors import TrainingError

_LOWEST = torch.iinfo(torch.int64).min + 1  # whose negative fits, too
_SHOWN = 3


def check_replicas(policy: PolicyModel, shape: WeightShape, layout: Layout) -> None:
    """Raise TrainingError, on every rank, if two copies of a weight differ in a bit; name weights and ranks.

    Reads the weights once. Collectives, on vectors with one entry per weight of this rank: all-reduces over the copies', the
    tensor-parallel and (tied embeddings) the pipeline group, and a small one over the control group.
    """
    if layout.world_size == 1:
        return
    names = policy.global_parameter_names()
    sums = {names[name]: checksum(weight) for name, weight in policy.named_weights()}
    parted = _parted(sums, shape, layout)
    if layout.max_over_ranks(torch.tensor([float(len(parted))])).item():
        raise TrainingError(_describe({name: int(sums[name]) for name in sums}, parted, layout))


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """int64 scalar on the tensor's device: its bytes added up as words of 8, modulo 2^64, so in any order."""
    content = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if content.storage_offset() % 8:
        content = content.clone()
    whole = content.numel() // 8 * 8
    return content[:whole].view(torch.int64).sum() + content[whole:].sum(dtype=torch.int64)


def _parted(sums: dict[str, torch.Tensor], shape: WeightShape, layout: Layout) -> list[str]:
    """The weights of this rank that another rank holds otherwise."""
    rules = {name: find_parameter(name, shape).rule for name in sums}
    dense = [name for name in sums if not rules[name].per_expert]
    groups = [
        (dense, layout.copies_group),
        ([name for name in sums if rules[name].per_expert], layout.expert_copies_group),
        ([name for name in dense if rules[name].cut is None], layout.tensor_group),
    ]
    compared = [({name: sums[name] for name in copied}, group) for copied, group in groups]
    if shape.tied and layout.pipeline > 1:
        compared.append((_tied_embedding(sums, layout), layout.pipeline_group))
    parted = [name for copies, group in compared for name in _differing(copies, group, layout.device)]
    return list(dict.fromkeys(parted))


def _tied_embedding(sums: dict[str, torch.Tensor], layout: Layout) -> dict[str, torch.Tensor | None]:
    """One entry on every stage; None on those between the first and the last."""
    name = "embedding.word_embeddings.weight" if layout.is_first_stage else "output_layer.weight"
    return {name: sums[name] if layout.is_first_stage or layout.is_last_stage else None}


def _differing(sums: dict[str, torch.Tensor | None], group: dist.ProcessGroup, device: torch.device) -> list[str]:
    """The names whose checksums differ within the group. An entry of None is another rank's business."""
    if not sums or group.size() == 1:
        return []
    lowest = torch.tensor(_LOWEST, device=device)
    largest = torch.stack([lowest if value is None else value for value in sums.values()])
    smallest = torch.stack([lowest if value is None else -value for value in sums.values()])
    extremes = torch.stack([largest, smallest])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    equal = (extremes[0] == -extremes[1]).tolist()
    return [name for name, same in zip(sums, equal, strict=True) if not same and sums[name] is not None]


def _describe(sums: dict[str, int], parted: list[str], layout: Layout) -> str:
    """The message; collective, for only a rank knows its own weights."""
    everywhere: list[dict[str, int]] = [{} for _ in range(layout.world_size)]
    dist.all_gather_object(everywhere, {name: sums[name] for name in parted}, group=layout.control_group)
    names = list(dict.fromkeys(name for held in everywhere for name in held))
    shown = "; ".join(f"{name} ({_sides(name, everywhere)})" for name in names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (
        f"copies of the same weights differ between ranks: {shown}{more}; every checkpoint and export from here on would hold "
        f"one of them only. Resume from the last checkpoint; if it happens again, look for faulty memory or links on these "
        f"ranks' machines, or for kernels that are not deterministic, and try parallel.sequence_parallel true"
    )


def _sides(name: str, everywhere: list[dict[str, int]]) -> str:
    """Which ranks agree with each other."""
    sides: dict[int, list[int]] = {}
    for rank, held in enumerate(everywhere):
        if name in held:
            sides.setdefault(held[name], []).append(rank)
    return " against ".join(f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" for ranks in sides.values())
