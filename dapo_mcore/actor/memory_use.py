"""The memory of the actor by category: bytes of its tensors, and peaks of scoring and of the gradient steps.

Change here: a category, or what belongs to it. memory.py moves the same tensors to the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, UntypedStorage

from dapo_mcore.actor.actor import Actor

GIB = 2**30
TENSORS = ("weights", "reference", "gradients", "optimizer", "optimizer_host", "head")
PHASES = ("score", "update")
CATEGORIES = (*TENSORS, *(f"{phase}_{what}" for phase in PHASES for what in ("peak", "activations")))


class MemoryUse:
    """One rank's memory in bytes. `phase` measures peaks; on a GPU only, because a CPU's allocator does not count."""

    def __init__(self, actor: Actor):
        self._actor = actor
        self._peaks: dict[str, int] = {}

    @contextmanager
    def phase(self, name: Literal["score", "update"]) -> Iterator[None]:
        """Measure the peak of the block, and how far it is above what was allocated before."""
        if self._actor.layout.device.type != "cuda":
            yield
            return
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield
        peak = torch.cuda.max_memory_allocated()
        self._peaks |= {f"{name}_peak": peak, f"{name}_activations": peak - before}

    def tensors(self) -> dict[str, int]:
        """Return the bytes of this rank's tensors by TENSORS, of storages that have memory, each counted once.

        An optimizer of fp32 weights updates the weights themselves, so they are not counted as its state. `head` is the logits
        of one chunk in fp32, which the policy head allocates on the last stage while it runs.
        """
        actor, device = self._actor, self._actor.layout.device.type
        state = [tensor for tensor in state_tensors(actor) if tensor.dim()]  # no step counts
        critic = actor.critic.model if actor.critic else None
        kinds = {
            "weights": (*weight_tensors(actor.policy), *weight_tensors(critic)),
            "reference": weight_tensors(actor.reference),
            "gradients": gradient_tensors(actor),
            "optimizer": (tensor for tensor in state if tensor.device.type == device),
            "optimizer_host": (tensor for tensor in state if tensor.device.type != device),
        }
        found, counted = dict.fromkeys(TENSORS, 0), set[int]()
        for name, tensors in kinds.items():
            new = {address: s.nbytes() for address, s in storages(tensors).items() if address not in counted}
            found[name] = sum(new.values())
            counted |= new.keys()
        if actor.layout.is_last_stage:
            found["head"] = actor.config.batch.head_chunk_tokens * len(actor.policy[-1].head_weight()) * 4
        return found

    def metrics(self) -> dict[str, float]:
        """Return `memory/…_gib`, each the largest over ranks; a category of which no rank has anything is left out.

        Forgets the peaks. Collective: one gloo all-reduce.
        """
        own = self.tensors() | self._peaks
        self._peaks = {}
        most = self._actor.layout.max_over_ranks(torch.tensor([own.get(name, 0) for name in CATEGORIES]))
        return {f"memory/{name}_gib": nbytes / GIB for name, nbytes in zip(CATEGORIES, most.tolist()) if nbytes}

    def start_line(self) -> str:
        """Return what the actor holds at the start of a run, for people. Collective: one gloo all-reduce."""
        held = {name.removeprefix("memory/").removesuffix("_gib"): value for name, value in self.metrics().items()}
        parts = ", ".join(f"{name.replace('_', ' on the ')} {_size(value)}" for name, value in held.items())
        return f"memory of a rank, at most: {parts}; Adam's moments and activations come on top"


def weight_tensors(model: torch.nn.Module | None) -> Iterable[Tensor]:
    """Return the parameters and buffers of a model, of none for None."""
    return () if model is None else (*model.parameters(), *model.buffers())


def gradient_tensors(actor: Actor) -> Iterable[Tensor]:
    """Return the gradient buffers of the policy and the critic."""
    chunks = [*actor.ddp, *(actor.critic.ddp if actor.critic else ())]
    return [b.grad_data for chunk in chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]


def state_tensors(actor: Actor) -> Iterator[Tensor]:
    """Yield the tensors of the optimizers of policy and critic."""
    yield from actor.optimizer.tensors()
    if actor.critic is not None:
        yield from actor.critic.optimizer.tensors()


def storages(tensors: Iterable[Tensor]) -> dict[int, UntypedStorage]:
    """Return the distinct storages that have memory, by address."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage for storage in found if storage.nbytes()}


def _size(gib: float) -> str:
    return f"{gib:.1f} GiB" if gib >= 1 else f"{gib * 1024:.1f} MiB"
