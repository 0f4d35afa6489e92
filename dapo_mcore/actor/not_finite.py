"""Finds the first tensor of a gradient step, over all ranks, that is not finite.

Change here: which tensors are searched, and in which order: along the step's data flow, so the first one found is the cause of
those after it. Only skipped steps are searched; every rollout step costs one pass over the weights.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dapo_mcore.actor.forward_backward import MicroBatchOutput
from dapo_mcore.actor.model.policy import Policy
from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.actor.update_guard import UpdateGuard
from dapo_mcore.errors import TrainingError
from dapo_mcore.types import MicroBatch

INPUTS = ("rollout_logprobs", "old_logprobs", "ref_logprobs", "values", "returns", "advantages", "token_weights")
ORDER = ("weight", *INPUTS, "logprobs", "loss", "gradient")


class Culprit(NamedTuple):
    """The first tensor that is not finite. Sorted, the one earliest in the data flow is first, then the lowest rank.

    place        index into ORDER
    rank         the lowest rank on which it is not finite
    name         of the weight, or of the weight whose gradient it is; empty for other tensors
    micro_batch, sample   number of the rank's micro-batch and of its first bad sample; -1 if the tensor belongs to none
    bad, size    number of its elements that are not finite, and of all its elements
    """

    place: int
    rank: int
    name: str
    micro_batch: int
    sample: int
    bad: int
    size: int

    @property
    def tensor(self) -> str:
        """Return the entry of ORDER."""
        return ORDER[self.place]

    def __str__(self) -> str:
        of = f" of {self.name}" if self.name else ""
        where = f", micro-batch {self.micro_batch}" if self.micro_batch >= 0 else ""
        sample = f", sample {self.sample}" if self.sample >= 0 else ""
        return (
            f"first not finite: {self.tensor}{of} on rank {self.rank}{where}{sample} ({self.bad} of {self.size} values)"
        )


def find_culprit(
    policy: Policy, micro_batches: Sequence[MicroBatch], outputs: Sequence[MicroBatchOutput], layout: Layout
) -> Culprit | None:
    """Return the first tensor that is not finite, on every rank; None if all are, as where only the norm overflows.

    outputs  what the gradient step kept of each micro-batch; empty on ranks before the last stage
    Collectives: one gloo gather and one gloo broadcast.
    """
    found = layout.gather_objects(_first_here(policy, micro_batches, outputs, layout.rank))
    culprit: Any = layout.broadcast_object(min((one for one in found if one is not None), default=None))
    return culprit


def explain_skip(guard: UpdateGuard, norm: float, search: Callable[[], Culprit | None]) -> tuple[str, Culprit | None]:
    """Return why a gradient step with this norm is skipped, for people, and what `search` finds if it is not finite."""
    if math.isfinite(norm):
        return guard.describe_spike(norm), None
    culprit = search()
    return str(culprit) if culprit else "all tensors are finite, but the gradient norm overflows", culprit


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return True if no tensor holds NaN or infinity. Reads each once and takes no memory: NaN is the minimum of what holds one."""
    ends = defaultdict(list)
    for tensor in tensors:
        if not tensor.numel():
            continue
        ends[tensor.device] += [end.float() for end in torch.aminmax(tensor)]
    return all(bool(torch.stack(found).isfinite().all()) for found in ends.values())


def check_weights(models: Mapping[str, Policy], layout: Layout) -> None:
    """Raise TrainingError, on every rank, if a weight of any rank is NaN or infinite. models  as in Actor.trained.

    Reads the weights once. Collective: one gloo all-gather.
    """
    layout.on_every_rank_or_raise(lambda: _check_own_weights(models, layout.rank))


def _check_own_weights(models: Mapping[str, Policy], rank: int) -> None:
    for name, model in models.items():
        if not all_finite(weight.detach() for _, weight in model.named_weights()):
            raise TrainingError(weights_lost(str(_first_here(model, (), (), rank)), name))


def weights_lost(cause: str, model: str = "policy") -> str:
    """Return the message for weights that are not finite, of which no later gradient step can recover."""
    section = "optimizer" if model == "policy" else f"{model}.optimizer"
    return (
        f"the {model}'s weights are no longer finite ({cause}): no gradient step can mend them, and they are neither saved nor "
        f"sent to the rollout engine; lower {section}.lr or {section}.clip_grad, and resume from the last checkpoint"
    )


def _first_here(
    policy: Policy, micro_batches: Sequence[MicroBatch], outputs: Sequence[MicroBatchOutput], rank: int
) -> Culprit | None:
    for tensor, name, number, values in _tensors(policy, micro_batches, outputs):
        # the largest magnitude needs no temporary of the tensor's size
        if values.numel() and not torch.linalg.vector_norm(values.detach(), torch.inf).isfinite():
            bad = ~values.detach().isfinite().view(-1)
            is_row = number >= 0 and len(bad) == len(micro_batches[number].rows)
            sample = int(micro_batches[number].sample_ids[int(bad.nonzero()[0])]) if is_row else -1
            return Culprit(ORDER.index(tensor), rank, name, number, sample, int(bad.sum()), len(bad))
    return None


def _tensors(
    policy: Policy, micro_batches: Sequence[MicroBatch], outputs: Sequence[MicroBatchOutput]
) -> Iterator[tuple[str, str, int, Tensor]]:
    """Yield (entry of ORDER, weight's name, number of the micro-batch, values) in ORDER."""
    weights = list(policy.named_weights())
    for name, weight in weights:
        yield "weight", name, -1, weight
    for field in INPUTS:
        for number, micro in enumerate(micro_batches):
            if (values := getattr(micro, field)) is not None:
                yield field, "", number, values
    for number, output in enumerate(outputs):
        if "logprobs" in output:  # a critic has none
            yield "logprobs", "", number, output["logprobs"]
    for number, output in enumerate(outputs):
        yield "loss", "", number, output["sums"]
    for name, weight in weights:
        if (gradient := getattr(weight, "main_grad", None)) is not None:
            yield "gradient", name, -1, gradient
