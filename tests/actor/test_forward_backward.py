"""Micro-batches through Megatron's schedule, in one process: nothing is averaged, nothing is scaled."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from dapo_mcore.actor import forward_backward
from dapo_mcore.actor.forward_backward import run_micro_batches
from dapo_mcore.actor.model.attention import SequenceParams
from dapo_mcore.actor.wrap import wrap
from dapo_mcore.batch.feeder import Feeder, build_feeder
from dapo_mcore.types import MicroBatch
from tests.actor import parity
from tests.actor.parity import Mesh


def micro_batch(tokens: list[int], lengths: list[int] | None = None) -> MicroBatch:
    """Return tokens in one row, packed if `lengths` are given. The loss weight of each token is its number."""
    row, none = torch.tensor(tokens), torch.empty(0)
    return MicroBatch(
        tokens=row[None],
        position_ids=torch.cat([torch.arange(n) for n in lengths or [len(tokens)]])[None],
        cu_seqlens=None if lengths is None else torch.tensor([0, *lengths]).cumsum(0).int(),
        lengths=np.array(lengths or [len(tokens)]),
        rows=torch.arange(len(tokens)),
        targets=row,
        advantages=none,
        token_weights=row.float(),
        rollout_logprobs=none,
        sample_ids=none,
    )


def weighted_sum(model: Any, hidden: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = (hidden[:, 0].sum(-1) * batch.token_weights).sum()
    return loss, {"loss": loss.detach(), "hidden": hidden.detach()[:, 0]}


@pytest.fixture(scope="module")
def ddp(alone) -> Any:
    config = parity.make_config(Mesh(), optimizer__distributed=False)
    (ddp,) = wrap(parity.build_actor(config, alone).policy, config.parallel, config.optimizer)
    return ddp


def gradient(ddp: Any, layout: Any, batches: list[MicroBatch], feeder: Feeder | None = None) -> torch.Tensor:
    ddp.zero_grad_buffer()
    run_micro_batches([ddp], batches, weighted_sum, layout, backward=True, feeder=feeder)
    return torch.cat([parameter.main_grad.flatten() for parameter in ddp.module.parameters()])


def test_the_gradient_of_two_micro_batches_is_the_sum_of_theirs(ddp, alone):
    first, second = micro_batch([5, 3, 8, 1]), micro_batch([2, 7])
    separate = gradient(ddp, alone, [first]) + gradient(ddp, alone, [second])
    together = gradient(ddp, alone, [first, second])
    torch.testing.assert_close(together, separate, rtol=1e-5, atol=1e-5 * separate.abs().max().item())
    double = first.with_(token_weights=2 * first.token_weights)
    torch.testing.assert_close(gradient(ddp, alone, [double]), 2 * gradient(ddp, alone, [first]))


def test_outputs_come_in_order_and_without_a_gradient_when_there_is_no_backward_pass(ddp, alone):
    ddp.zero_grad_buffer()
    batches = [micro_batch([5, 3, 8]), micro_batch([2]), micro_batch([4, 4])]
    outputs = run_micro_batches([ddp.module], batches, weighted_sum, alone, backward=False)
    assert [len(output["hidden"]) for output in outputs] == [3, 1, 2]
    assert all(not parameter.main_grad.any() for parameter in ddp.module.parameters())
    for output, batch in zip(outputs, batches, strict=True):
        assert output["loss"].item() == pytest.approx((output["hidden"].sum(-1) @ batch.token_weights).item())


def test_packed_sequences_give_what_each_gives_alone(ddp, alone):
    parts = [[5, 3, 8], [2, 7, 6, 1]]
    run = lambda *batches: run_micro_batches([ddp.module], batches, weighted_sum, alone, backward=False)  # noqa: E731
    (packed,) = run(micro_batch(parts[0] + parts[1], lengths=[3, 4]))
    separate = run(*map(micro_batch, parts))
    torch.testing.assert_close(packed["hidden"], torch.cat([output["hidden"] for output in separate]))


def test_transformer_engine_gets_boundaries_on_the_device_and_no_plan(ddp, alone, monkeypatch):
    """The layers here are local: only what a model would get is looked at."""
    given, batch = [], micro_batch([5, 3, 8, 2], lengths=[3, 1])

    def forward(tokens: torch.Tensor, *_: Any, packed_seq_params: Any) -> torch.Tensor:
        given.append(packed_seq_params)
        return torch.zeros(tokens.size(1), 1, 64)

    monkeypatch.setattr(ddp.module, "forward", forward)
    for implementation in ("local", "transformer_engine"):
        monkeypatch.setattr(ddp.module.config, "transformer_impl", implementation)
        run_micro_batches([ddp.module], [batch], weighted_sum, alone, backward=False)
        monkeypatch.setattr(forward_backward, "plan_attention", None)
    local, engine = given
    assert isinstance(local, SequenceParams) and len(local.plan.output_slots) == 4
    assert type(engine) is PackedSeqParams and engine.cu_seqlens_q is engine.cu_seqlens_kv is batch.cu_seqlens
    assert local.cu_seqlens_q.tolist() == engine.cu_seqlens_q.tolist() == [0, 3, 4]
    assert local.max_seqlen_q == engine.max_seqlen_kv == 3


def test_every_feeder_gives_the_same_gradient(ddp, alone):
    pytest.importorskip("nvidia.dali", reason="needs the extra dali")
    batches = [micro_batch([5, 3, 8], lengths=[2, 1]), micro_batch([2]), micro_batch([4, 4, 1, 7], lengths=[4])]
    plain, dali = (gradient(ddp, alone, batches, build_feeder(kind, alone.device)) for kind in ("plain", "dali"))
    assert torch.equal(plain, dali) and plain.norm() > 0


def test_layers_that_obey_the_flag_of_the_first_micro_batch_give_the_same_scores_and_gradients(alone):
    """With FP8, the first micro-batch of a schedule call makes Transformer Engine's layers quantize their weights again, and
    replace main_grad; later ones use the same weights and add to it. So a gradient step is one call."""
    config = parity.make_config(Mesh(), batch__max_tokens=40)
    plain, flagged = (parity.build_actor(config, alone) for _ in range(2))
    linear = obey_the_flag(flagged)
    mini_batch = parity.shared_step(config, alone, parity.make_batch(), plain)[0]
    assert len(mini_batch) > 2
    for factor in (1.0, 1.1):  # weights that stay from the first round would give other scores in the second
        for actor in (plain, flagged):
            with torch.no_grad():
                torch._foreach_mul_(list(actor.policy.parameters()), factor)
        for ours, theirs in zip(flagged.score(mini_batch), plain.score(mini_batch), strict=True):
            torch.testing.assert_close(ours.old_logprobs, theirs.old_logprobs, rtol=1e-5, atol=1e-6)
        for actor in (plain, flagged):
            actor.backward(mini_batch)
        for ours, theirs in zip(flagged.policy.parameters(), plain.policy.parameters(), strict=True):
            torch.testing.assert_close(ours.main_grad, theirs.main_grad, rtol=1e-5, atol=1e-7)
    gradient = linear[0].weight.main_grad.clone()
    run_micro_batches(flagged.ddp, mini_batch, flagged._policy_loss, alone, backward=True)
    torch.testing.assert_close(
        linear[0].weight.main_grad, gradient, rtol=1e-5, atol=1e-7
    )  # a second call loses the first


def obey_the_flag(actor: Any) -> list[torch.nn.Module]:
    """Return the actor's linear layers, which now treat weights and main_grad as Transformer Engine's do."""
    actor.policy.config.fp8 = "e4m3"  # Megatron sets the flag with FP8 only; local layers do not read this field
    linear = [m for m in actor.policy.modules() if isinstance(m, ColumnParallelLinear | RowParallelLinear)]
    for module in linear:
        module.is_first_microbatch, module._forward_impl = False, partial(flagged_product, layer=module)
    return linear


class FlaggedProduct(torch.autograd.Function):
    """A product with the weight's quantized copy and fused accumulation (Transformer Engine 2.11, pytorch/module/linear.py)."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, copy: torch.Tensor, first: bool) -> torch.Tensor:
        ctx.weight, ctx.copy, ctx.hidden, ctx.first = weight, copy, hidden.detach(), first
        return hidden @ copy.T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        weight = ctx.weight
        found = gradient.flatten(0, -2).T @ ctx.hidden.flatten(0, -2)
        weight.main_grad.copy_(found if ctx.first else weight.main_grad + found)
        weight.grad_added_to_main_grad = True
        return gradient @ ctx.copy, torch.zeros_like(weight), None, None


def flagged_product(*, input: torch.Tensor, weight: torch.Tensor, bias: Any, layer: Any, **_: Any) -> torch.Tensor:
    if layer.is_first_microbatch:
        layer.copy = weight.detach().clone()
    product = FlaggedProduct.apply(input, weight, layer.copy, layer.is_first_microbatch)
    layer.is_first_microbatch = False
    return product if bias is None else product + bias
