"""The actor's device memory, given up while rollout servers use the device, and taken back with the same values.

Change here: what goes to the host and what is only freed. Storages are emptied and refilled in place, so every view of
them stays one: Megatron's parameter and gradient buffers, the shards of its optimizer. (Megatron-core 0.16.1's own
`offload_to_cpu` gives parameters new memory, which leaves the shards of the fp32 distributed optimizer behind.)
"""

from __future__ import annotations

from collections.abc import Iterable

import psutil
import torch
from torch import Tensor, UntypedStorage

from dapo_mcore.actor.actor import Actor
from dapo_mcore.actor.parallel.layout import num_local_ranks
from dapo_mcore.errors import ResourceError

GIB = 2**30


class ActorMemory:
    """One rank's weights (with the reference policy's), gradients and optimizer state, on the device or on the host.

    `offload_state`, then `offload_weights`, then `onload`, as often as needed; in between, a weight sync reads the weights.
    Nothing of the actor may run before `onload`: its tensors have no memory. No communication.
    """

    def __init__(self, actor: Actor):
        self._actor = actor
        pinned = actor.layout.device.type == "cuda"
        num_ranks = num_local_ranks()
        self._state, self._weights = _HostCopy(pinned, num_ranks), _HostCopy(pinned, num_ranks)
        self._gradients: list[tuple[UntypedStorage, int]] = []

    @property
    def nbytes(self) -> int:
        """Device memory that the actor's tensors hold now, in bytes; beside it, activations and scratch."""
        every = (*self._weight_tensors(), *self._gradient_tensors(), *self._state_tensors())
        return sum(storage.nbytes() for storage in _storages(every).values())

    def offload_state(self) -> None:
        """Moves the optimizer state to the host and frees gradients, whose values the next gradient step does not need."""
        weights, gradients = _storages(self._weight_tensors()), _storages(self._gradient_tensors())
        # an fp32 optimizer works on the weights themselves, or on shards of their buffer
        state = {key: s for key, s in _storages(self._state_tensors()).items() if key not in weights | gradients}
        self._state.take(state.values())
        self._gradients = [(storage, storage.nbytes()) for storage in gradients.values()]
        for storage, _ in self._gradients:
            storage.resize_(0)
        self._actor.layout.free_scratch()

    def offload_weights(self) -> None:
        """Moves the weights to the host."""
        self._weights.take(_storages(self._weight_tensors()).values())
        self._actor.layout.free_scratch()

    def onload(self) -> None:
        """Brings everything back; gradients come back without values."""
        for storage, nbytes in self._gradients:
            storage.resize_(nbytes)
        self._gradients = []
        self._weights.give_back()
        self._state.give_back()

    def _weight_tensors(self) -> Iterable[Tensor]:
        for model in (self._actor.policy, self._actor.reference):
            if model is not None:
                yield from model.parameters()
                yield from model.buffers()

    def _gradient_tensors(self) -> Iterable[Tensor]:
        ddp = self._actor.ddp
        return (buffer.grad_data for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers))

    def _state_tensors(self) -> Iterable[Tensor]:
        device = self._actor.layout.device
        for tensor in self._actor.optimizer.tensors():
            if tensor.device.type == device.type:  # torch's AdamW counts its steps on the host
                yield tensor


class _HostCopy:
    """Values of storages while these have no memory. Host buffers are pinned once and used again.

    num_ranks  of the trainer on this machine, which do the same at the same time.
    """

    def __init__(self, pinned: bool, num_ranks: int = 1):
        self._pinned, self._num_ranks = pinned, num_ranks
        self._buffers: list[Tensor] = []
        self._taken: list[UntypedStorage] = []

    def take(self, storages: Iterable[UntypedStorage]) -> None:
        assert not self._taken, "taken already"
        taken = list(storages)
        self._make_room([storage.nbytes() for storage in taken])
        for storage, buffer in zip(taken, self._buffers, strict=True):
            buffer.copy_(_bytes_of(storage), non_blocking=True)
        if self._pinned:
            torch.cuda.synchronize()
        for storage in taken:
            storage.resize_(0)
        self._taken = taken

    def give_back(self) -> None:
        for storage, buffer in zip(self._taken, self._buffers):
            storage.resize_(buffer.nbytes)
            _bytes_of(storage).copy_(buffer, non_blocking=True)
        if self._pinned:
            torch.cuda.synchronize()
        self._taken = []

    def _make_room(self, sizes: list[int]) -> None:
        if [buffer.nbytes for buffer in self._buffers] == sizes:
            return
        self._buffers = []
        ours, memory = sum(sizes), psutil.virtual_memory()
        # what is available changes while the others take theirs; without this, all would find room and be killed
        if ours > memory.available or self._num_ranks * ours > memory.total:
            raise ResourceError(
                f"rollout.sglang.colocated keeps {ours / GIB:.1f} GiB of this rank's actor on the host during generation, "
                f"and {self._num_ranks} ranks of this machine do, but {memory.available / GIB:.1f} GiB of host memory are "
                f"available, of {memory.total / GIB:.1f}; use more nodes, or servers on GPUs of their own (colocated false)"
            )
        self._buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned) for size in sizes]


def _storages(tensors: Iterable[Tensor]) -> dict[int, UntypedStorage]:
    """The distinct storages that hold memory, by address."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage for storage in storages if storage.nbytes()}


def _bytes_of(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
