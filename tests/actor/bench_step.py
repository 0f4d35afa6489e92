"""What a rollout step costs beside the model, for long chains of thought: padding, balance, and the host's CPU time.

    pytest -m bench tests/actor/bench_step.py                  two minutes, 2 GB

Lengths are made up: prompts of 50 to 400 tokens, responses log-normal with median 6,000, cut at 20,480.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dapo_mcore.kernels.policy_loss import PolicyHeadOutput
from transformers import Qwen2Config

from dapo_mcore.actor.forward_backward import _sequence_params
from dapo_mcore.actor.learner import Learner
from dapo_mcore.actor.metrics import micro_batch_stats
from dapo_mcore.actor.model.fp8_rules import token_multiple
from dapo_mcore.actor.scatter import SampleMetadata, plan_step, scatter_step
from dapo_mcore.architecture.flops import forward_flops
from dapo_mcore.batch.context import pack_multiple, padded_length, round_up
from dapo_mcore.batch.feeder import DaliFeeder, pack, unpack
from dapo_mcore.batch.microbatch import build_micro_batch
from dapo_mcore.types import MicroBatch, TrainBatch
from tests.actor.parity import Mesh, make_config
from tests.measured import cpu_s, report

pytestmark = pytest.mark.bench

GROUP_SIZE, MAX_TOKENS, DATA_PARALLEL = 16, 22_528, 8
QWEN_32B = Qwen2Config(
    vocab_size=152_064, hidden_size=5120, intermediate_size=27_648, num_hidden_layers=64, num_attention_heads=40,
    num_key_value_heads=8, architectures=["Qwen2ForCausalLM"],
)  # fmt: skip
LAYOUTS = {
    "TP1": Mesh(),
    "TP4 SP": Mesh(tensor=4, sequence_parallel=True),
    "TP8 SP": Mesh(tensor=8, sequence_parallel=True),
    "TP4 SP CP2": Mesh(tensor=4, context=2, sequence_parallel=True),
    "TP8 SP CP4": Mesh(tensor=8, context=4, sequence_parallel=True),
}


def long_lengths(num_samples: int, scale: float = 1.0) -> np.ndarray:
    """Return int64 [num_samples], prompt and response tokens of each sample, times `scale`."""
    random = np.random.default_rng(0)
    responses = np.minimum(random.lognormal(np.log(6_000), 0.8, num_samples), 20_480)
    return np.maximum((random.integers(50, 400, num_samples) + responses) * scale, 20).astype(np.int64)


def made_up(lengths: np.ndarray) -> TrainBatch:
    """Return a batch of samples with these lengths; the first tenth of each is its prompt."""
    random, offsets = np.random.default_rng(0), np.concatenate([[0], np.cumsum(lengths)])
    mask = np.ones(offsets[-1], dtype=bool)
    for begin, length in zip(offsets, lengths // 10 + 1):
        mask[begin : begin + length] = False
    return TrainBatch(
        tokens=random.integers(0, 150_000, offsets[-1], dtype=np.int32),
        loss_mask=mask,
        rollout_logprobs=-random.random(offsets[-1], dtype=np.float32) * mask,
        offsets=offsets,
        rewards=random.choice([-1.0, 1.0], len(lengths)),
        group_ids=np.arange(len(lengths)) // GROUP_SIZE,
        in_statistics=np.ones(len(lengths), dtype=bool),
    )


def test_padding_and_balance(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a rollout step of 512 prompts in 16 gradient steps. `fill` is the share of max_tokens that real tokens take."""
    lengths = long_lengths(512 * GROUP_SIZE)
    metadata = SampleMetadata(lengths, lengths, lengths, np.arange(len(lengths)) // GROUP_SIZE, lengths > 0)
    rows = []
    for name, mesh in LAYOUTS.items():
        for recipe in (None, "tensorwise", "blockwise", "mxfp8"):
            fp8 = {"model__fp8": {"recipe": recipe}, "model__dtype": "bf16"} if recipe else {}
            config = make_config(mesh, batch__max_tokens=MAX_TOKENS, **fp8)
            layout: Any = SimpleNamespace(data=DATA_PARALLEL, context=mesh.context)
            plan = plan_step(metadata, config, layout, mini_batch_prompts=32, seed=0)
            rows.append({"layout": name, "fp8": recipe or "no", **padding(plan, lengths, config, mesh.context)})
    title = (
        f"{len(lengths):,} samples, {lengths.mean():,.0f} tokens each, DP {DATA_PARALLEL}, max_tokens {MAX_TOKENS:,}"
    )
    with capsys.disabled():
        report("balance", title, rows)


def padding(plan: Any, lengths: np.ndarray, config: Any, context_parallel: int) -> dict[str, Any]:
    """Return shares of tokens, and the largest of the data-parallel ranks over their mean, in the worst gradient step."""
    multiple = token_multiple(config.model, config.parallel)
    whole, flops = pack_multiple(context_parallel, multiple), forward_flops(QWEN_32B)
    parts = [[[lengths[part] for part in rank] for rank in mini.micro] for mini in plan]
    processed = sum(
        int(round_up(max(padded_length(part, context_parallel).sum(), 1), whole))
        for mini in parts
        for rank in mini
        for part in rank
    )
    real, num_packs = lengths.sum(), sum(len(rank) for mini in parts for rank in mini)
    tokens = [[sum(part.sum() for part in rank) for rank in mini] for mini in parts]
    work = [[sum(flops.count(part, part.sum()) for part in rank) for rank in mini] for mini in parts]
    return {
        "multiple": multiple,
        "packs": num_packs,
        "real/processed": float(real / processed),
        "fill": float(real / (num_packs * MAX_TOKENS * context_parallel)),
        "tokens max/mean": max(float(np.max(each) / np.mean(each)) for each in tokens),
        "FLOPs max/mean": max(float(np.max(each) / np.mean(each)) for each in work),
    }


def test_step_cost_against_batch_and_length(alone: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """CPU seconds of one rank without replicas, whose samples are a tenth as long. `growth` is per token, over the first row."""
    host_cost(made_up(long_lengths(512, 0.1)), alone)
    rows: list[dict[str, Any]] = []
    for what, num_samples, scale in [
        *(("batch", 512 * times, 0.1) for times in (1, 2, 4, 8, 16)),
        *(("length", 512, 0.1 * times) for times in (1, 2, 5, 10)),
    ]:
        row = {"more": what, "samples": num_samples, **host_cost(made_up(long_lengths(num_samples, scale)), alone)}
        first = next((r for r in rows if r["more"] == what), row)
        rows.append(row | {"growth": row["ms/Mtokens"] / first["ms/Mtokens"]})
    with capsys.disabled():
        report("step_cost", f"CPU time of a rollout step on the host, max_tokens {MAX_TOKENS:,}", rows)


def host_cost(batch: TrainBatch, layout: Any) -> dict[str, float]:
    config = make_config(Mesh(), batch__max_tokens=MAX_TOKENS)
    learner: Any = Learner(SimpleNamespace(config=config, layout=layout), pad_token=0)
    step = scatter_step(batch, config, layout, mini_batch_prompts=32, seed=0)
    plan = cpu_s(lambda: plan_step(step.metadata, config, layout, 32, 0), rounds=3)
    scatter = cpu_s(lambda: scatter_step(batch, config, layout, mini_batch_prompts=32, seed=0), rounds=3)
    build = cpu_s(lambda: learner.build(step, "token-mean"), rounds=3)
    million = float(batch.offsets[-1] / 1e6)
    parts = {"Mtokens": million, "plan s": plan, "scatter s": scatter - plan, "build s": build}
    return parts | {"ms/Mtokens": 1e3 * (scatter + build) / million}


def test_host_time_around_a_micro_batch(capsys: pytest.CaptureFixture[str]) -> None:
    """All but the model and the head, of 16 sequences with 22,528 tokens. A GPU does the arithmetic of the statistics, so there
    the host only starts it, which statistics of one token show."""
    lengths = long_lengths(16)
    lengths = lengths * 22_500 // lengths.sum()
    batch, samples, cpu = made_up(lengths), list(range(16)), torch.device("cpu")
    fixed = dict(context_parallel=1, context_rank=0, tensor_multiple=128, packing=True, pad_token=0)
    build = lambda: build_micro_batch(batch, samples, advantages=np.zeros(16), weights=np.ones(16), **fixed)  # noqa: E731
    micro = build()
    flat, many, one = torch.from_numpy(pack(micro)), scored(micro, len(micro.rows)), scored(micro, 1)
    values, layout = torch.rand(16), SimpleNamespace(context=1, context_rank=0, device=cpu)
    tis = make_config(Mesh()).algo.tis
    parts = {
        "build": build,
        "sample numbers, advantages": lambda: [micro.with_(advantages=values.index_select(0, micro.sample_ids))] * 2,
        "to the device: pack, unpack": lambda: (pack(micro), unpack(flat, micro)),
        "sequences for Transformer Engine": lambda: _sequence_params(micro, layout, engine=True),
        "statistics, started": lambda: micro_batch_stats(*one, tis),
        "for a CPU: statistics": lambda: micro_batch_stats(*many, tis),
        "for a CPU: sequences and attention plan": lambda: _sequence_params(micro, layout, engine=False),
    }
    taken = {name: 1e3 * cpu_s(part, rounds=201) for name, part in parts.items()}
    taken = {"sum on a GPU's host": sum(list(taken.values())[:5])} | taken
    with capsys.disabled():
        rows = [{"part": name, "ms": value} for name, value in taken.items()]
        report("around_micro_batch", f"CPU time around a micro-batch of {micro.tokens.numel():,} tokens", rows)


def scored(micro: MicroBatch, num_rows: int) -> tuple[PolicyHeadOutput, MicroBatch]:
    """Return what a head could have put out for the first rows, and these rows' micro-batch."""
    rollout = micro.rollout_logprobs[:num_rows]
    old, none = rollout - 0.01 * torch.rand(num_rows), torch.zeros(num_rows)
    output = PolicyHeadOutput(torch.tensor(0.0), old, none, none + 1, *[none.bool()] * 3, kl=none)
    return output, micro.with_(old_logprobs=old, rollout_logprobs=rollout)


def test_dali_against_plain(capsys: pytest.CaptureFixture[str]) -> None:
    """The host's part for lists of micro-batches of 22,528 tokens. Plain is what it does for a GPU, without the copy."""
    pytest.importorskip("nvidia.dali", reason="needs the extra dali")
    lengths = long_lengths(16)
    batch = made_up(lengths * 22_500 // lengths.sum())
    fixed = dict(context_parallel=1, context_rank=0, tensor_multiple=128, packing=True, pad_token=0)
    micro = build_micro_batch(batch, list(range(16)), advantages=np.zeros(16), weights=np.ones(16), **fixed)
    feeders = {
        "plain ms": lambda given: [unpack(torch.from_numpy(pack(one)), one) for one in given],
        "dali ms": lambda given: list(DaliFeeder(torch.device("cpu"))(given)),
    }
    rows = []
    for count in (1, 2, 8, 32):
        each = {name: 1e3 / count * cpu_s(partial(feed, [micro] * count), rounds=31) for name, feed in feeders.items()}
        rows.append({"micro-batches": count, **each, "dali/plain": each["dali ms"] / each["plain ms"]})
    with capsys.disabled():
        report("feeders", "CPU time per micro-batch, all threads, pipelines and their ends included", rows)
