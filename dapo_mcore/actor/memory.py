"""Frees the actor's device memory while rollout servers use the device, and restores it with the same values.

Change here: what is copied to the host and what is only freed. Storages are emptied and refilled in place, so all views of
them stay valid: Megatron's parameter and gradient buffers, and its optimizer's shards. (Megatron-core 0.16.1's own
`offload_to_cpu` moves parameters to new memory, and the shards of the fp32 distributed optimizer would keep the old one.)
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, UntypedStorage
from torch.nn import Module

from dapo_mcore.actor.actor import Actor
from dapo_mcore.actor.host_copy import HostCopy
from dapo_mcore.actor.memory_use import gradient_tensors, state_tensors, storages, weight_tensors
from dapo_mcore.actor.parallel.layout import num_local_ranks


class ActorMemory:
    """One rank's weights (the reference policy's and critic's too), gradients and optimizer state, on the device or on the host.

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

    @property
    def host_nbytes(self) -> int:
        """Return the host memory of what has been offloaded so far, in bytes. It stays allocated for the next time."""
        return self._state.nbytes + self._weights.nbytes

    def offload_state(self) -> None:
        """Move the optimizer state to the host and free the gradients and FP8 copies of weights, which nothing reads again."""
        weights, gradients = storages(self._weight_tensors()), storages(self._gradient_tensors())
        # an fp32 optimizer updates the weights themselves, or shards of their buffer
        state = {key: s for key, s in storages(self._state_tensors()).items() if key not in weights | gradients}
        self._state.offload(state.values())
        self._gradients = [(storage, storage.nbytes()) for storage in gradients.values()]
        for storage, _ in self._gradients:
            storage.resize_(0)
        for model in self._models():
            _drop_fp8_copies(model)
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
        return [tensor for model in self._models() for tensor in weight_tensors(model)]

    def _models(self) -> list[Module | None]:
        critic = self._actor.critic
        return [self._actor.policy, self._actor.reference, critic.model if critic else None]

    def _gradient_tensors(self) -> Iterable[Tensor]:
        return gradient_tensors(self._actor)

    def _state_tensors(self) -> Iterable[Tensor]:
        device = self._actor.layout.device
        for tensor in state_tensors(self._actor):
            if tensor.device.type == device.type:  # torch's AdamW keeps its step counts on the host
                yield tensor


def _drop_fp8_copies(model: Module | None) -> None:
    """Free the FP8 weights that Transformer Engine's modules keep beside the bf16 ones, as they do themselves when the recipe
    changes: the next forward pass casts the weights again, as the first micro-batch of each pass does anyway (2.11, module/base.py).
    """
    for module in () if model is None else model.modules():
        getattr(module, "_fp8_workspaces", {}).clear()
