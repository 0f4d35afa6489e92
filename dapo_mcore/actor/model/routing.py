"""The routers of experts: an auxiliary load-balancing loss that no packing changes, and the replay of routes.

Change here: what a router adds to Megatron's. With S samples that have a loss token in a mini-batch, T_b tokens in sample b,
E experts of which K are chosen per token, n_bi tokens of b routed to expert i and scores s_ti of token t (the softmax, or the
sigmoid divided by its sum), a layer's auxiliary loss is that of DeepSeek-V3 (section 2.1.2), per sequence:

    L = 1/S · Σ_b Σ_i (E / (K · T_b) · n_bi) · (1 / T_b · Σ_t s_ti)        1 if the experts' loads are equal

Unlike there, n_bi counts the routes that are taken, with the bias of DeepSeek's routers and after a replay. T_b and S are
known before the first forward pass, and padding belongs to no sample. Megatron's own losses (0.16.1) take a micro-batch's pack
as one sequence, and weigh it by the micro-batch's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from torch.nn import functional

from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.config.model import ModelConfig
from dapo_mcore.types import MicroBatch


class ExpertRouting:
    """What the routers of a model share: the micro-batch that they route, and their losses since the last `take_loss`.

    A backward pass that recomputes layers must `enter` its micro-batch again: in a pipeline, others have passed since.
    """

    def __init__(self, model: ModelConfig, layout: Layout):
        self.coef = model.moe_aux_loss_coef
        self.replays = model.routing_replay != "none"
        self.record = False
        self.batch: MicroBatch | None = None
        self.sequences: torch.Tensor | None = None
        self._layout = layout
        self._loss = torch.zeros((), dtype=torch.float64, device=layout.device)

    def enter(self, batch: MicroBatch, *, record: bool) -> None:
        """Make `batch` the micro-batch that the routers see, with tensors on the device.

        record  True to fill `batch.routes`, False to replay them. Neither happens if it is None.
        """
        self.batch, self.record = batch, record
        if batch.sequence_ids is not None:
            # routers see tokens in [s, b] order; with experts, tensor parallelism comes with sequence parallelism
            self.sequences = batch.sequence_ids.t().chunk(self._layout.tensor)[self._layout.tensor_rank].flatten()

    def add_loss(self, loss: torch.Tensor) -> None:
        self._loss += loss.detach()

    def take_loss(self) -> torch.Tensor:
        """Return Σ L of this rank's layers, tokens and micro-batches since the last call, fp64. A sum over all ranks is whole."""
        taken, self._loss = self._loss, torch.zeros_like(self._loss)
        return taken


class PolicyRouter(TopKRouter):
    """Megatron's router with the auxiliary loss and the replay of `ExpertRouting`."""

    shared: ExpertRouting

    def routing(self, logits: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (probs, routes), both [tokens, E]. Overrides megatron-core 0.16 to 0.19.

        If there is an auxiliary loss, the gradient of probs carries that of the loss along. A layer that is recomputed has it
        in the pass with gradients only, so it counts once. Collective then: all-reduce over the tensor- and context-parallel
        group, of [sequences, E].
        """
        probs, routes = super().routing(logits, *args, **kwargs)
        if not (self.shared.coef and torch.is_grad_enabled()):
            return probs, routes
        loss = self._balance_loss(logits.flatten(0, -2), routes)
        self.shared.add_loss(loss)
        return _WithLoss.apply(probs, self.shared.coef * loss), routes

    def _balance_loss(self, logits: torch.Tensor, routes: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of L, differentiable. logits [tokens, E], routes bool [tokens, E]."""
        batch, sequences = self.shared.batch, self.shared.sequences
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # the last row is for padding
        counts = logits.new_zeros(len(batch.balance_weights) + 1, logits.size(-1))
        counts.index_add_(0, sequences, routes.to(counts.dtype))
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(counts, group=self.tp_cp_group)
        slopes = counts[:-1] * batch.balance_weights[:, None] * (logits.size(-1) / self.topk)
        return (functional.pad(slopes, (0, 0, 0, 1))[sequences] * self._scores(logits)).sum()

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        if self.score_function == "softmax":
            return logits.softmax(-1)
        scores = logits.sigmoid()
        return scores / scores.sum(-1, keepdim=True)


class _WithLoss(torch.autograd.Function):
    """The identity of probs, whose backward pass also starts that of a loss."""

    @staticmethod
    def forward(ctx: Any, probs: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.one = torch.ones_like(loss)
        return probs.view_as(probs)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradient, ctx.one


class Replay:
    """Records or replays the routes of one layer, in the place of Megatron's RouterReplay.

    Megatron's keeps lists in the order in which layers were built, and a backward pass takes the first entry. This one has a
    place for each layer of each micro-batch, which it may read any number of times.
    """

    def __init__(self, shared: ExpertRouting, layer_number: int):
        self.shared = shared
        self.layer_number = layer_number

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (scores of the chosen experts, their indices), both [tokens, topk]. scores [tokens, E].

        Routes stay in host memory, which is pinned if the device is a GPU; no copy waits for the device.
        """
        routes = self.shared.batch.routes if self.shared.batch else None
        if routes is not None and not self.shared.record:
            assert self.layer_number in routes, f"no recorded routes of layer {self.layer_number} in this micro-batch"
            indices = routes[self.layer_number].to(scores.device, non_blocking=True).long()
            assert indices.shape == (len(scores), topk), "these routes are another micro-batch's"
            return scores.gather(1, indices), indices
        chosen, indices = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if routes is not None:
            kind = torch.uint8 if scores.size(1) <= 256 else torch.int16
            routes[self.layer_number] = indices.to(kind).to("cpu", non_blocking=True)
        return chosen, indices


def share_routing(model: torch.nn.Module, settings: ModelConfig, layout: Layout) -> ExpertRouting | None:
    """Return what the routers of `model` share from now on; None if it has none."""
    shared = None
    for router in routers(model):
        router.shared = shared = shared or ExpertRouting(settings, layout)
        if shared.replays:
            router.router_replay = Replay(shared, router.layer_number)
    return shared


def routers(model: torch.nn.Module) -> Iterator[PolicyRouter]:
    """Yield the routers of a model, or of part of it."""
    return (module for module in model.modules() if isinstance(module, PolicyRouter))
