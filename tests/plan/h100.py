"""Rows of an H100 table: gradient steps of a few layers, each with a mini-batch of seven sequences in two packs.

NVIDIA H100 80GB HBM3, commit 86517fe, torch 2.11.0+cu130, Transformer Engine 2.11.0, megatron-core 0.16.1; one process, one run;
4,096 rows of the policy head at a time; peak_gib is torch's. Left out are the table's rows with delayed scaling, which is refused
today, and with local layers, which a plan does not model. Rows that kernels/results/h100-actors.jsonl repeats differ by up to 7 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from dapo_mcore.plan.batch import Batch
from dapo_mcore.plan.job import Job
from tests.plan.jobs import hub_config, job

_ALIGNED = (6656, 5248, 10624, 6528, 3584, 8192, 2944)
_RAGGED = (6718, 5327, 10677, 6594, 3704, 8307, 3053)
_PROMPT = 32


@dataclass(frozen=True)
class Row:
    """A measured gradient step: the model with `layers` of its layers. peak_gib includes no CUDA context; score_s is a
    scoring pass."""

    name: str
    model: str
    layers: int
    peak_gib: float
    update_s: float
    score_s: float
    fp8: str | None = None
    recompute: str = "none"
    lengths: tuple[int, ...] = _ALIGNED

    @cached_property
    def job(self) -> Job:
        hf_config = type(hub_config(self.model)).from_dict(
            hub_config(self.model).to_dict() | {"num_hidden_layers": self.layers, "layer_types": None}
        )
        alone: dict[str, Any] = {"parallel": {}, "rollout": {}}
        model = {"path": "unused", "dtype": "bf16", "recompute": self.recompute}
        batch = {"head_chunk_tokens": 4096}
        if self.fp8:
            model["fp8"] = {"recipe": self.fp8}
        return job(nodes=1, gpus_per_node=1, hf_config=hf_config, model=model, batch=batch, **alone)

    @property
    def batch(self) -> Batch:
        """The mean of the two packs."""
        lengths = np.array(self.lengths, dtype=np.float64)
        tokens, count = float(lengths.sum()), len(lengths)
        return Batch(
            groups_generated=count,
            kept_ratio=1,
            responses=count,
            train_samples=count,
            samples=count,
            updates=1,
            micro_batches=2,
            mean_response=tokens / count - _PROMPT,
            mean_sample=tokens / count,
            tokens=tokens / 2,
            squares=float(np.square(lengths).sum()) / 2,
            loss_tokens=tokens / 2 - _PROMPT * count / 2,
            widest=int(tokens / 2),
            imbalance=1,
        )


ROWS = (
    Row("32B, 2 layers, bf16", "Qwen2.5-32B", 2, 55.4, 0.876, 0.273),
    Row("32B, 2 layers, FP8 tensorwise", "Qwen2.5-32B", 2, 55.7, 0.719, 0.230, fp8="tensorwise"),
    Row("32B, 2 layers, FP8 blockwise", "Qwen2.5-32B", 2, 55.3, 0.773, 0.225, fp8="blockwise"),
    Row("1.5B, 14 layers, bf16", "Qwen2.5-1.5B", 14, 39.0, 0.584, 0.190),
    Row("1.5B, 14 layers, FP8 tensorwise", "Qwen2.5-1.5B", 14, 36.7, 0.537, 0.195, fp8="tensorwise"),
    Row(
        "1.5B, 28 layers, bf16, recompute full",
        "Qwen2.5-1.5B",
        28,
        30.6,
        1.458,
        0.343,
        recompute="full",
        lengths=_RAGGED,
    ),
    Row("7B, 4 layers, bf16, ragged packs", "Qwen2.5-7B", 4, 50.2, 0.812, 0.244, lengths=_RAGGED),
)
