"""Forward and backward passes over micro-batches through Megatron's pipeline schedule.

Change here: how Megatron's schedule is called; the objective is in kernels/ and algo/loss. Only this module deals with how
Megatron scales a loss: `calculate_per_token_loss=True` makes the schedule leave the loss alone, gradients are summed over
data- and context-parallel ranks, and `num_tokens=None` keeps finalize_model_grads from dividing. The token weights already
contain 1/N, with N counted over the whole mini-batch before the first forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import tee
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func

from dapo_mcore.actor.model.attention import SequenceParams, plan_attention
from dapo_mcore.actor.model.policy import Policy, PolicyModel
from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.actor.param_gather import wait_for_parameter
from dapo_mcore.batch.feeder import Feeder, PlainFeeder
from dapo_mcore.types import MicroBatch

MicroBatchOutput = dict[str, torch.Tensor]
"""Named tensors that a loss function keeps of one micro-batch: log-probs, or statistics."""

LossFunction = Callable[[PolicyModel, torch.Tensor, MicroBatch], tuple[torch.Tensor, MicroBatchOutput]]


def run_micro_batches(
    chunks: Iterable[DistributedDataParallel] | Policy,
    micro_batches: Sequence[MicroBatch],
    loss_function: LossFunction,
    layout: Layout,
    *,
    backward: bool,
    replay: bool = False,
    feeder: Feeder | None = None,
) -> list[MicroBatchOutput]:
    """Return the output that `loss_function` keeps of each micro-batch, on last-stage ranks; an empty list elsewhere.

    `chunks` are the policy's, wrapped in DDP for a backward pass. `loss_function(chunk, hidden [s, b, H], micro_batch)` gets the
    last one and returns (loss to differentiate, output to keep). With `backward`, main_grad holds the gradients afterwards,
    summed over data- and context-parallel ranks. Every rank must call this with the same number of micro-batches, a multiple
    of `parallel.micro_batch_multiple`. Each chunk takes them in order, so the outputs are in order too.
    Collectives: all of Megatron's for one gradient step.
    replay  without `backward` too, the routers take the routes that micro-batches have, in place of recording them
    feeder  brings the micro-batches to the device; the plain one by default
    """
    chunks, feed = list(chunks), feeder or PlainFeeder(layout.device)
    forward_step = partial(_forward_step, loss_function=loss_function, layout=layout, record=not (backward or replay))
    schedule = get_forward_backward_func()
    tokens = micro_batches[0].tokens
    with torch.enable_grad() if backward else torch.no_grad():
        return schedule(
            forward_step_func=forward_step,
            data_iterator=list(tee(feed(micro_batches), len(chunks))),  # every chunk reads the same copies
            model=chunks,
            num_microbatches=len(micro_batches),
            seq_length=tokens.size(1) * layout.context,
            micro_batch_size=tokens.size(0),
            forward_only=not backward,
        )


def finalize_without_division(
    model: list[torch.nn.Module], num_tokens: torch.Tensor | None = None, **groups: Any
) -> None:
    """Finalise gradients as Megatron does (sums over ranks, tied embeddings, sequence-parallel norms), without dividing."""
    finalize_model_grads(model, None, **groups)


def _forward_step(
    iterator: Iterator[MicroBatch], model: torch.nn.Module, *, loss_function: LossFunction, layout: Layout, record: bool
) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, MicroBatchOutput]]]:
    layout.beacon.tick()
    batch = next(iterator)
    engine = model.config.transformer_impl == "transformer_engine"
    packed = _sequence_params(batch, layout, engine=engine)
    routing = _unwrapped(model).expert_routing
    if routing is not None:
        routing.enter(batch, record=record)
    hidden = model(batch.tokens, batch.position_ids, None, packed_seq_params=packed)
    if routing is not None and hidden.requires_grad:
        hidden.register_hook(lambda _: routing.enter(batch, record=record))  # before the layers' backward pass
    return hidden, partial(_loss, model, batch, loss_function)


def _loss(
    model: torch.nn.Module, batch: MicroBatch, loss_function: LossFunction, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, MicroBatchOutput]:
    policy = _unwrapped(model)
    if policy is not model:
        wait_for_parameter(model, policy.head_weight())
    loss, output = loss_function(policy, hidden, batch)
    # Megatron neither averages nor scales a loss in the form (loss, token count, output); it does not use the count
    return loss, torch.zeros((), dtype=torch.int, device=hidden.device), output


def _unwrapped(model: torch.nn.Module) -> PolicyModel:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _sequence_params(batch: MicroBatch, layout: Layout, *, engine: bool) -> PackedSeqParams | None:
    """Return Megatron's parameters of a packed micro-batch, None for a rectangle.

    Transformer Engine reads the boundaries on the device. Local layers read them on the host (Megatron's rotary embedding,
    in every layer) and share an attention plan. Neither waits for the device.
    """
    if batch.cu_seqlens is None:
        return None
    boundaries = batch.cu_seqlens if engine else torch.from_numpy(np.cumsum(np.append(0, batch.lengths)))
    common = dict(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )
    if engine:
        return PackedSeqParams(**common)
    return SequenceParams(
        **common, plan=plan_attention(batch.lengths, layout.context, layout.context_rank, layout.device)
    )
