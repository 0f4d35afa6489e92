"""Frees the actor's device memory while rollout servers use the device, and restores it with the same values.

Change here: what is copied to the host and what is only freed. Storages are emptied and refilled in place, so all views of
them stay valid: Megatron's parameter and gradient buffers, and its optimizer's shards. (Megatron-core 0.16.1's own
`offload_to_cpu` moves parameters to new memory, and the shards of the fp32 distributed optimizer would keep the old one.)
"""

from __future__ import annotations

from collections.abc import Iterable

import psutil
import torch
from torch import Tensor, UntypedStorage

from dapo_mcore.actor.actor import Actor
from dapo_mcore.actor.memory_use import GIB, gradient_tensors, storages, weight_tensors
from dapo_mcore.actor.parallel.layout import num_local_ranks
from dapo_mcore.errors import ResourceError


class ActorMemory:
    """One rank's weights (the reference policy's too), gradients and optimizer state, on the device or on the host.

    Call `offload_state`, then `offload_weights`, then `onload`, as often as needed. A weight sync may read the weights between
    the first two calls. After an offload the actor must not run until `onload`: its tensors have no memory. No communication.
    """

    def __init__(self, actor: Actor):
        self._actor = actor
        pinned = actor.layout.device.type == "cuda"
        num_ranks = num_local_ranks()
        self._state, self._weights = HostCopy(pinned, num_ranks), HostCopy(pinned, num_ranks)
        self._gradients: list[tuple[UntypedStorage, int]] = []

    @property
    def nbytes(self) -> int:
        """Return the device memory that the actor's tensors hold now, in bytes, without activations and scratch memory."""
        tensors = (*self._weight_tensors(), *self._gradient_tensors(), *self._state_tensors())
        return sum(storage.nbytes() for storage in storages(tensors).values())

    def offload_state(self) -> None:
        """Move the optimizer state to the host and free the gradients. The next gradient step does not need their values."""
        weights, gradients = storages(self._weight_tensors()), storages(self._gradient_tensors())
        # an fp32 optimizer updates the weights themselves, or shards of their buffer
        state = {key: s for key, s in storages(self._state_tensors()).items() if key not in weights | gradients}
        self._state.offload(state.values())
        self._gradients = [(storage, storage.nbytes()) for storage in gradients.values()]
        for storage, _ in self._gradients:
            storage.resize_(0)
        self._actor.layout.free_scratch()

    def offload_weights(self) -> None:
        """Move the weights to the host."""
        self._weights.offload(storages(self._weight_tensors()).values())
        self._actor.layout.free_scratch()

    def onload(self) -> None:
        """Restore everything on the device. Gradients get memory, but not their values."""
        for storage, nbytes in self._gradients:
            storage.resize_(nbytes)
        self._gradients = []
        self._weights.onload()
        self._state.onload()

    def _weight_tensors(self) -> Iterable[Tensor]:
        return (*weight_tensors(self._actor.policy), *weight_tensors(self._actor.reference))

    def _gradient_tensors(self) -> Iterable[Tensor]:
        return gradient_tensors(self._actor)

    def _state_tensors(self) -> Iterable[Tensor]:
        device = self._actor.layout.device
        for tensor in self._actor.optimizer.tensors():
            if tensor.device.type == device.type:  # torch's AdamW keeps its step counts on the host
                yield tensor


class HostCopy:
    """The values of storages that have no memory, in host buffers. Buffers are pinned once and reused.

    num_ranks  the trainer's ranks on this machine; all of them offload at the same time
    """

    def __init__(self, pinned: bool, num_ranks: int = 1):
        self._pinned, self._num_ranks = pinned, num_ranks
        self._buffers: list[Tensor] = []
        self._offloaded: list[UntypedStorage] = []

    def offload(self, given: Iterable[UntypedStorage]) -> None:
        """Copy the storages to the host and free their device memory. Raises ResourceError if the host has too little."""
        assert not self._offloaded, "offloaded already"
        offloaded = list(given)
        self._allocate([storage.nbytes() for storage in offloaded])
        for storage, buffer in zip(offloaded, self._buffers, strict=True):
            buffer.copy_(_bytes_of(storage), non_blocking=True)
        if self._pinned:
            torch.cuda.synchronize()
        for storage in offloaded:
            storage.resize_(0)
        self._offloaded = offloaded

    def onload(self) -> None:
        """Give the storages memory again and copy their values back."""
        for storage, buffer in zip(self._offloaded, self._buffers):
            storage.resize_(buffer.nbytes)
            _bytes_of(storage).copy_(buffer, non_blocking=True)
        if self._pinned:
            torch.cuda.synchronize()
        self._offloaded = []

    def _allocate(self, sizes: list[int]) -> None:
        if [buffer.nbytes for buffer in self._buffers] == sizes:
            return
        self._buffers = []
        needed, memory = sum(sizes), psutil.virtual_memory()
        # ranks allocate at the same time: each could find enough available memory, and all together be killed
        if needed > memory.available or self._num_ranks * needed > memory.total:
            raise ResourceError(
                f"rollout.sglang.colocated keeps {needed / GIB:.1f} GiB of this rank's actor on the host during generation, "
                f"on each of this machine's {self._num_ranks} ranks, but {memory.available / GIB:.1f} GiB of host memory are "
                f"available, of {memory.total / GIB:.1f}; use more nodes, or servers on GPUs of their own (colocated false)"
            )
        self._buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned) for size in sizes]


def _bytes_of(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
