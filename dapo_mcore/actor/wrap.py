"""Megatron's DistributedDataParallel around the chunks of a trained model.

Change here: how gradients are kept and summed over ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from dapo_mcore.actor.forward_backward import finalize_without_division
from dapo_mcore.actor.model.policy import Policy
from dapo_mcore.config.optimizer import OptimizerConfig
from dapo_mcore.config.parallel import ParallelConfig


def wrap(policy: Policy, parallel: ParallelConfig, optimizer: OptimizerConfig) -> list[DistributedDataParallel]:
    """Return the model's chunks with fp32 gradient buffers, which are summed over ranks once per gradient step and never
    divided. optimizer  that of this model."""
    policy.config.finalize_model_grads_func = finalize_without_division
    options = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        bucket_size=parallel.bucket_size,
        use_distributed_optimizer=optimizer.distributed,
        average_in_collective=False,
    )
    chunks = [DistributedDataParallel(policy.config, options, chunk) for chunk in policy]
    if parallel.overlap_grad_reduce:
        policy.config.no_sync_func = partial(_without_reduction, chunks)
    return chunks


@contextmanager
def _without_reduction(chunks: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Let micro-batches add their gradients. Megatron's schedules leave this before the last one, which starts the sums."""
    with ExitStack() as stack:
        for chunk in chunks:
            stack.enter_context(chunk.no_sync())
        yield
