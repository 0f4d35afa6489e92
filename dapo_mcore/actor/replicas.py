"""Checks with checksums that all copies of a weight on different ranks are bitwise equal.

Change here: which ranks hold copies, and how copies are compared. Data- and context-parallel ranks hold the same shards,
tensor-parallel ranks the same norms, routers, latent projections and value head, and the last pipeline stage a copy of a tied
embedding. Without this check, nobody would notice that copies differ: exports and checkpoints contain only one of them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from dapo_mcore.actor.model.policy import VALUE_HEAD, Policy
from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.architecture.mapping import find_parameter
from dapo_mcore.architecture.shape import WeightShape
from dapo_mcore.errors import TrainingError

_LOWEST = torch.iinfo(torch.int64).min + 1  # its negative is an int64 too
_SHOWN = 3


def check_replicas(policy: Policy, shape: WeightShape, layout: Layout) -> None:
    """Raise TrainingError, on every rank, if two copies of a weight differ in a bit. The error names weights and ranks.

    Reads the weights once. Collectives: all-reduces of one number per weight over the groups of copies, the tensor-parallel
    group and (tied embeddings) the pipeline group, and a small all-reduce over the control group.
    """
    if layout.world_size == 1:
        return
    sums = {name: checksum(weight) for name, weight in policy.named_weights()}
    is_tied = policy[0].share_embeddings_and_output_weights
    differing = _differing_weights(sums, shape, layout, is_tied=is_tied)
    if layout.max_over_ranks(torch.tensor([float(len(differing))])).item():
        raise TrainingError(_describe({name: int(sums[name]) for name in differing}, layout))


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of the tensor's 8-byte words modulo 2^64, as an int64 scalar on its device. The order does not matter."""
    content = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if content.storage_offset() % 8:
        content = content.clone()
    whole = content.numel() // 8 * 8
    return content[:whole].view(torch.int64).sum() + content[whole:].sum(dtype=torch.int64)


def _differing_weights(
    sums: dict[str, torch.Tensor], shape: WeightShape, layout: Layout, *, is_tied: bool
) -> list[str]:
    """Return the names of this rank's weights of which another rank holds a different copy."""
    heads = [name for name in sums if name.startswith(VALUE_HEAD)]
    rules = {name: find_parameter(name, shape).rule for name in sums if name not in heads}
    dense = [name for name, rule in rules.items() if not rule.per_expert]
    groups = [
        ([*dense, *heads], layout.copies_group),
        ([name for name, rule in rules.items() if rule.per_expert], layout.expert_copies_group),
        ([*(name for name in dense if rules[name].tp_split is None), *heads], layout.tensor_group),
    ]
    compared = [({name: sums[name] for name in copied}, group) for copied, group in groups]
    if is_tied and layout.pipeline > 1:
        compared.append((_tied_embedding(sums, layout), layout.pipeline_group))
    names = [name for copies, group in compared for name in _differing(copies, group, layout.device)]
    return list(dict.fromkeys(names))


def _tied_embedding(sums: dict[str, torch.Tensor], layout: Layout) -> dict[str, torch.Tensor | None]:
    """Return one entry on every stage. Its value is None on stages between the first and the last."""
    name = "embedding.word_embeddings.weight" if layout.is_first_stage else "output_layer.weight"
    return {name: sums[name] if layout.is_first_stage or layout.is_last_stage else None}


def _differing(sums: dict[str, torch.Tensor | None], group: dist.ProcessGroup, device: torch.device) -> list[str]:
    """Return the names whose checksums differ within the group. None means that this rank has no copy."""
    if not sums or group.size() == 1:
        return []
    lowest = torch.tensor(_LOWEST, device=device)
    largest = torch.stack([lowest if value is None else value for value in sums.values()])
    smallest = torch.stack([lowest if value is None else -value for value in sums.values()])
    extremes = torch.stack([largest, smallest])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    equal = (extremes[0] == -extremes[1]).tolist()
    return [name for name, same in zip(sums, equal, strict=True) if not same and sums[name] is not None]


def _describe(differing: dict[str, int], layout: Layout) -> str:
    """Return the error message, given this rank's differing checksums. Collective: all-gather over the control group."""
    sums_of_ranks = layout.share_objects(differing)
    names = list(dict.fromkeys(name for sums in sums_of_ranks for name in sums))
    shown = "; ".join(f"{name} ({_agreeing_ranks(name, sums_of_ranks)})" for name in names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (
        f"copies of the same weights differ between ranks: {shown}{more}; every checkpoint and export from now on would hold "
        f"only one of them. Resume from the last checkpoint; if it happens again, look for faulty memory or links on these "
        f"ranks' machines, or for kernels that are not deterministic, and try parallel.sequence_parallel true"
    )


def _agreeing_ranks(name: str, sums_of_ranks: list[dict[str, int]]) -> str:
    """Return which ranks hold equal copies, for instance "ranks 0, 1 against rank 2"."""
    ranks_by_sum: dict[int, list[int]] = {}
    for rank, sums in enumerate(sums_of_ranks):
        if name in sums:
            ranks_by_sum.setdefault(sums[name], []).append(rank)
    sides = ranks_by_sum.values()
    return " against ".join(f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" for ranks in sides)
