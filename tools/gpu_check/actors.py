"""Measure the actor on packs of long, ragged sequences: seconds, TFLOP/s and memory of scoring and of a gradient step.

    python -m tools.gpu_check.actors FOLDER        # from the root of the repository; writes FOLDER/actors.jsonl

Change here: the cases. They have the real shapes of a model with fewer layers and random weights. TFLOP/s count the
model's FLOPs (dapo_mcore/architecture/flops.py), three forward passes per gradient step.
A CPU runs one tiny case, as a rehearsal.
"""

from __future__ import annotations

import dapo_mcore.process.environment  # noqa: F401  isort: skip  (before torch)

import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from dapo_mcore.actor.actor import Actor
from dapo_mcore.actor.learner import Learner
from dapo_mcore.actor.parallel import layout as layouts
from dapo_mcore.actor.scatter import scatter_step
from dapo_mcore.architecture.flops import forward_flops
from dapo_mcore.architecture.manifest import WeightManifest
from dapo_mcore.config.file import parse_config
from dapo_mcore.model_files.hf_config import load_hf_config
from dapo_mcore.types import TrainBatch

GPU = torch.cuda.is_available()
NUM_STEPS = 3
PROMPT_TOKENS = 32
SHAPES = {
    "1.5B": dict(hidden_size=1536, intermediate_size=8960, num_attention_heads=12, num_key_value_heads=2, vocab_size=151_936),
    "7B": dict(hidden_size=3584, intermediate_size=18_944, num_attention_heads=28, num_key_value_heads=4, vocab_size=152_064),
    "32B": dict(hidden_size=5120, intermediate_size=27_648, num_attention_heads=40, num_key_value_heads=8, vocab_size=152_064),
    "tiny": dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, vocab_size=1000),
}  # fmt: skip
Value = TypeVar("Value")


@dataclass(frozen=True)
class Case:
    """A model of `layers` layers, trained on two packs of at most `max_tokens` tokens.

    fp8       recipe of model.fp8, None without FP8.
    offload   optimizer.offload_fraction.
    multiple  every sequence length is a multiple of it.
    """

    name: str
    model: str
    layers: int
    dtype: str = "bf16"
    recompute: str | list[str] = "none"
    transformer_impl: str = "auto"
    fp8: str | None = None
    offload: float = 0.0
    max_tokens: int = 22_528
    multiple: int = 128


GPU_CASES = (
    Case("32B-2L-bf16", "32B", 2),
    Case("32B-2L-fp8-tensorwise", "32B", 2, fp8="tensorwise"),
    Case("1.5B-14L-bf16", "1.5B", 14),
    Case("1.5B-14L-fp8-tensorwise", "1.5B", 14, fp8="tensorwise"),
    Case("32B-2L-fp8-blockwise", "32B", 2, fp8="blockwise"),
    Case("7B-4L-bf16-ragged", "7B", 4, multiple=1),
    Case("7B-4L-fp8-blockwise-ragged", "7B", 4, fp8="blockwise", multiple=1),
    Case("1.5B-28L-bf16-recompute", "1.5B", 28, recompute="full"),
    Case("1.5B-28L-bf16-recompute-mlp", "1.5B", 28, recompute=["mlp"]),
    Case("1.5B-14L-bf16-offload", "1.5B", 14, offload=1.0),
    Case("1.5B-8L-local", "1.5B", 8, transformer_impl="local"),
)
CPU_CASES = (
    Case("tiny-fp32", "tiny", 2, "fp32", max_tokens=512, multiple=16),
    Case("tiny-fp8-tensorwise", "tiny", 2, "fp32", fp8="tensorwise", max_tokens=512, multiple=1),
)


class RandomWeights:
    """Weight reader that draws normal matrices and biases of 0, norms of 1, on the layout's device."""

    def __init__(self, hf_config: Any, device: torch.device):
        self._shapes = WeightManifest.of_config(hf_config).shapes
        self._device, self._generator = device, torch.Generator(device).manual_seed(0)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._shapes[name])

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> torch.Tensor:
        shape = list(self.shape(name))
        if dim is not None:
            shape[dim] = stop - start
        if len(shape) == 1:
            return torch.full(shape, float(not name.endswith("bias")), device=self._device)
        return torch.randn(shape, generator=self._generator, device=self._device).mul_(0.02)


def main(folder: Path) -> int:
    """Run every case and append its row. Return 1 if a case failed."""
    layout = layouts.start(parse_config(_tree(CPU_CASES[0], "unused", [1])).parallel, seed=0)
    failed = False
    for case in GPU_CASES if GPU else CPU_CASES:
        row = {"name": case.name, **_attempt(case, layout)}
        failed |= row["state"] == "failed"
        with (folder / "actors.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    layouts.stop()
    return int(failed)


def measure(case: Case, layout: layouts.Layout) -> dict[str, Any]:
    """Score and train on the same packs NUM_STEPS times. Return times, rates, memory and gradient norms."""
    lengths = sequence_lengths(case)
    with tempfile.TemporaryDirectory() as model_folder:
        _write_hf_config(case, Path(model_folder))
        config = parse_config(_tree(case, model_folder, lengths))
        hf_config = load_hf_config(config.model)
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    actor = Actor(config, hf_config, layout, RandomWeights(hf_config, layout.device))
    static_gib = _gib(torch.cuda.memory_allocated())
    learner = Learner(actor, pad_token=0)
    batch = make_batch(lengths, hf_config.vocab_size)
    share = scatter_step(batch, config, layout, mini_batch_prompts=config.batch.mini_batch_prompts, seed=None)
    score_s, update_s, grad_norms = [], [], []
    for _ in range(NUM_STEPS):
        scored = learner.score(share)  # computes nothing: its one mini-batch needs no scoring pass
        seconds, _ = _timed(lambda scored=scored: actor.score(scored.mini_batches[0]))
        score_s.append(seconds)
        seconds, sums = _timed(lambda scored=scored: learner.update(scored))
        update_s.append(seconds)
        grad_norms.append(sums[0].grad_norm)
    flops = forward_flops(hf_config).count(lengths, int(batch.loss_mask.sum()))
    return {
        "num_tokens": int(lengths.sum()),
        "num_samples": len(lengths),
        "longest": int(lengths.max()),
        "transformer_impl": actor.policy.config.transformer_impl,
        "score_s": score_s,
        "update_s": update_s,
        "score_tflops": round(flops / min(score_s[1:]) / 1e12, 1),
        "update_tflops": round(3 * flops / min(update_s[1:]) / 1e12, 1),
        "update_tokens_per_s": round(int(lengths.sum()) / min(update_s[1:])),
        "static_gib": static_gib,
        "peak_gib": _gib(torch.cuda.max_memory_allocated()),
        "grad_norms": grad_norms,
    }


def sequence_lengths(case: Case) -> np.ndarray:
    """Return int64 [B], log-normal lengths that fill two packs to 98.5 %."""
    rng, lengths = np.random.default_rng(0), []
    scale, total = case.max_tokens / 22_528, 2 * case.max_tokens * 0.985
    while sum(lengths) < total - 300:
        length = int(min(20_480 * scale, max(64, rng.lognormal(np.log(6000 * scale), 0.9))))
        lengths.append(min(length, int(total - sum(lengths))))
    return np.maximum(case.multiple, np.array(lengths) // case.multiple * case.multiple)


def make_batch(lengths: np.ndarray, vocab_size: int) -> TrainBatch:
    """Return random tokens in groups of two samples, of which one is right; the first tokens carry no loss."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    mask = np.ones(offsets[-1], bool)
    for start in offsets[:-1]:
        mask[start : start + PROMPT_TOKENS] = False
    numbers = np.arange(len(lengths))
    return TrainBatch(
        tokens=np.random.default_rng(0).integers(0, vocab_size, offsets[-1]).astype(np.int32),
        loss_mask=mask,
        rollout_logprobs=np.where(mask, -np.log(vocab_size), 0.0).astype(np.float32),
        offsets=offsets,
        rewards=np.where(numbers % 2, 1.0, -1.0),
        group_ids=(numbers // 2).astype(np.int64),
        in_statistics=np.ones(len(lengths), bool),
    )


def _attempt(case: Case, layout: layouts.Layout) -> dict[str, Any]:
    if GPU and case.fp8 and find_spec("transformer_engine") is None:
        return {"state": "needs Transformer Engine"}
    try:
        return {"state": "ok", **measure(case, layout)}
    except Exception as error:  # the other cases still run
        return {"state": "failed", "error": f"{type(error).__name__}: {str(error)[:400]}"}


def _tree(case: Case, model_folder: str, lengths: np.ndarray | list[int]) -> dict[str, Any]:
    num_prompts = len(lengths)
    return {
        "model": {
            "path": model_folder,
            "init": "random",
            "dtype": case.dtype,
            "transformer_impl": case.transformer_impl,
            "recompute": case.recompute,
            "fp8": case.fp8 and {"recipe": case.fp8},
        },
        "data": {"files": ["unused"], "max_prompt_tokens": 64},
        "rollout": {"max_response_tokens": case.max_tokens - 64},
        "sampling": {"train_batch_prompts": num_prompts, "gen_batch_prompts": num_prompts, "style": "none"},
        "batch": {
            "max_tokens": case.max_tokens,
            "mini_batch_prompts": num_prompts,
            "head_chunk_tokens": 4096,
            "shuffle": False,
        },
        "optimizer": {"lr": 1e-6, "offload_fraction": case.offload},
    }


def _write_hf_config(case: Case, folder: Path) -> None:
    fixed = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "use_sliding_window": False,
        "tie_word_embeddings": case.model in ("1.5B", "tiny"),
        "num_hidden_layers": case.layers,
    }
    (folder / "config.json").write_text(json.dumps(fixed | SHAPES[case.model]))


def _timed(call: Callable[[], Value]) -> tuple[float, Value]:
    start = time.perf_counter()
    value = call()
    if GPU:
        torch.cuda.synchronize()
    return round(time.perf_counter() - start, 4), value


def _gib(num_bytes: int) -> float:
    return round(num_bytes / 2**30, 2)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
