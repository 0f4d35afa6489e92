"""What every way of weights to servers has in common.

Change here: the contract between the engine and disk.py, distributed.py, tensor.py. manifest.py has checked the tensors
before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dapo_mcore.architecture.manifest import Bucket
from dapo_mcore.rollout.sglang.client.loop_thread import LoopThread
from dapo_mcore.rollout.sglang.pool.pool import Fleet, Resync


class Transfer(Protocol):
    """`resync` gives a server that comes back the weights of a tag; None where they are not kept."""

    resync: Resync | None

    def empty(self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for a tensor of the next stream, as types.ReceivingEngine.empty."""
        ...

    def send(
        self, buckets: Iterator[tuple[Bucket, bool]], tag: str, fleet: Fleet, loop: LoopThread
    ) -> dict[str, float]:
        """Gives every serving server the stream's weights as `tag`, in one Fleet.update: `sync/…_s` times, `sync/bytes`."""
        ...

    def close(self) -> None: ...
