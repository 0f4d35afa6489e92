"""Waits for the parameters that an overlapped all-gather still brings (parallel.overlap_param_gather).

The distributed optimizer updates a different shard of each bucket on every data-parallel rank. With the overlap, the forward pass
of a module waits for the bucket of its own parameters and starts the gather of the next one. Every other read comes after one of
the functions here. Change here: who waits for what.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core.distributed import DistributedDataParallel


@torch.no_grad()
def gather_parameters(chunks: Iterable[DistributedDataParallel]) -> None:
    """Wait until this rank has the updates of all data-parallel ranks. Does nothing if it has them already.

    Collective: with the overlap, the all-gathers that no forward pass has started, over the data-parallel groups.
    """
    for chunk in chunks:
        if chunk.use_forward_hook:  # otherwise the optimizer's step has gathered
            for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
                if group.param_gather_handle is not None or not group.param_gather_dispatched:
                    group.start_param_sync(force_sync=True)


def wait_for_parameter(chunk: DistributedDataParallel, parameter: torch.Tensor) -> None:
    """Wait for a parameter that is read outside the forward pass of its module. Collective: as a forward pass."""
    if chunk.use_forward_hook:
        chunk.param_to_bucket_group[parameter].finish_param_sync()
