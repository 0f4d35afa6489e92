"""Rank 0 at the size of a cluster: its CPU time by stage and its peak memory for 8,192 samples a step and up to ten times that.

    pytest -m bench -s tests/bench_controller.py

The controller, its sampler and its reward are real. The servers' answers are ready bytes of SGLang's form, which a fake engine
reads and gives back in random order. Lengths are log-normal, cut at 20,480, and the growth is measured with a sixteenth of
them: all stages but one cost by the token, and ten times 8,192 whole responses need 40 GiB.
"""

from __future__ import annotations

import gc
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from threading import Condition, Thread
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config

from dapo_mcore import controller as module
from dapo_mcore.batch.collate import select
from dapo_mcore.batch.packing import plan_micro_batches, split_mini_batches
from dapo_mcore.config.schema import Config
from dapo_mcore.controller import Controller
from dapo_mcore.observe.progress import NullProgress
from dapo_mcore.observe.timing import PhaseTimer
from dapo_mcore.rollout.sampling import sampler
from dapo_mcore.rollout.sampling.respond import Responder
from dapo_mcore.rollout.sglang.client import reply
from dapo_mcore.types import Rollout, SamplingParams, TrainBatch
from tests.measured import report
from tests.model_files.peak_memory import PeakMemory, give_freed_memory_back

pytestmark = pytest.mark.bench
GROUPS, GROUP_SIZE, LONGEST, MEDIAN, SPREAD, VOCAB = 512, 16, 20_480, 6000, 0.9, 50_000
DATA_PARALLEL, MINI_BATCHES, MAX_TOKENS, NUM_ANSWERS = 8, 16, 22_528, 64
RUNS = {"x1, whole lengths": (1, 1), **{f"x{scale}, lengths / 16": (scale, 16) for scale in (1, 2, 4, 10)}}
"""Scale and divisor of lengths."""


class Stages:
    """CPU seconds of each stage: those of the thread that works on it."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **options: Any) -> Any:
            with self.stage(name):
                return call(*args, **options)

        return wrapper

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.thread_time()
        yield
        self.seconds[name] += time.thread_time() - start


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE with random tokens of one to six bytes."""
    luck, alphabet = random.Random(0), sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys(alphabet)
    while len(tokens) < VOCAB:
        tokens["".join(luck.choices(alphabet, k=luck.randint(2, 6)))] = None
    backend = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def answers(divisor: int) -> list[bytes]:
    """Return answers of /generate whose lengths are the quantiles of the distribution."""
    luck = np.random.default_rng(0)
    lengths = np.exp(np.log(MEDIAN) + SPREAD * luck.standard_normal(NUM_ANSWERS)).clip(32, LONGEST) / divisor
    return [_answer(luck, max(1, int(length))) for length in lengths]


def _answer(luck: np.random.Generator, length: int) -> bytes:
    tokens = luck.integers(0, VOCAB, length).tolist()
    logprobs = (-luck.exponential(0.4, length)).astype(np.float32).tolist()
    meta = {
        "id": "0" * 16,
        "finish_reason": {"type": "stop", "matched": tokens[-1]},
        "weight_version": "0",
        "output_token_logprobs": [[logprob, token, None] for logprob, token in zip(logprobs, tokens)],
    }
    return json.dumps({"output_ids": tokens, "meta_info": meta}, separators=(",", ":")).encode()


class ReadyEngine:
    """Reads ready answers in its own thread, a random group of those in flight at a time."""

    weight_version, weights_lost = 0, False

    def __init__(self, ready: list[bytes], stages: Stages):
        self._ready, self._stages, self._luck = ready, stages, random.Random(0)
        self._rule = reply.VersionRule({"0": 0}, "0")
        self._in_flight: list[tuple[Future[list[Rollout]], int]] = []
        self._changed, self._closed = Condition(), False
        Thread(target=self._serve, daemon=True).start()

    def submit(self, prompts: list[np.ndarray], params: SamplingParams) -> Future[list[Rollout]]:
        future: Future[list[Rollout]] = Future()
        with self._changed:
            self._in_flight.append((future, len(prompts)))
            self._changed.notify()
        return future

    def generate(self, prompts: list[np.ndarray], params: SamplingParams) -> list[Rollout]:
        return [self._read(raw) for raw in self._luck.choices(self._ready, k=len(prompts))]

    def cancel_requests(self) -> None: ...

    def update_weights(self, weights: object, version: int) -> None: ...

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._in_flight or self._closed)
                if self._closed:
                    return
                place = self._luck.randrange(len(self._in_flight))
                self._in_flight[place], self._in_flight[-1] = self._in_flight[-1], self._in_flight[place]
                future, count = self._in_flight.pop()
            future.set_result([self._read(raw) for raw in self._luck.choices(self._ready, k=count)])

    def _read(self, raw: bytes) -> Rollout:
        with self._stages.stage("replies"):
            return reply.read_reply(reply.decode(raw), self._rule, ())


def settings(folder: Path, scale: int) -> Config:
    prompts = "".join(json.dumps({"prompt": str(number), "answer": "2"}) + "\n" for number in range(4 * scale * GROUPS))
    (folder / "train.jsonl").write_text(prompts)
    groups = scale * GROUPS
    return Config.model_validate(
        {
            "output_dir": str(folder / "runs"),
            "model": {"path": "unused"},
            "data": {"files": str(folder / "train.jsonl"), "answer_key": "answer", "deduplicate": False},
            "rollout": {"engine": "sglang", "group_size": GROUP_SIZE, "max_response_tokens": LONGEST},
            "sampling": {"style": "none", "train_batch_prompts": groups, "on_full": "keep", "max_staleness": 2},
            "batch": {"mini_batch_prompts": groups, "max_tokens": MAX_TOKENS},
            "algo": {"old_logprobs": "rollout"},
            "observe": {"tensorboard": False, "plot_at_end": False},
        }
    )


def share_out(batch: TrainBatch, mini_batches: int, stages: Stages, name: str) -> None:
    """Plan a step in so many mini-batches, and select each replica's samples."""
    with stages.stage(f"plan of {name}"):
        shares: list[list[int]] = [[] for _ in range(DATA_PARALLEL)]
        groups = int(batch.group_ids[-1]) + 1
        for samples in split_mini_batches(batch.group_ids, groups // mini_batches, seed=0):
            plan = plan_micro_batches(
                batch.lengths[samples], data_parallel=DATA_PARALLEL, context_parallel=1, max_tokens=MAX_TOKENS
            )
            for share, rank in zip(shares, plan):
                share += [int(samples[index]) for part in rank for index in part]
    with stages.stage("select"):
        for share in shares:
            select(batch, share)


def measure(folder: Path, scale: int, divisor: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Return the CPU seconds of each stage of the second of two steps, and the peak memory of both."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # as in a run
    stages = Stages()
    engine = ReadyEngine(answers(divisor), stages)
    monkeypatch.setattr(module, "stop_token_ids", lambda *_: (1,))
    monkeypatch.setattr(module, "build_engine", lambda *_, **__: engine)
    for stage in ("to_train_batch", "group_metrics"):
        monkeypatch.setattr(module, stage, stages.timed(stage, getattr(module, stage)))
    monkeypatch.setattr(
        sampler,
        "Responder",
        lambda engine, reward, decode, *rest: Responder(
            engine, stages.timed("score", reward), stages.timed("decode", decode), *rest
        ),
    )
    controller = Controller(settings(folder, scale), Qwen2Config(), bytes_tokenizer(), NullProgress(), PhaseTimer())
    controller.open_run(None)
    gc.collect()
    with PeakMemory() as memory:
        for step in (1, 2):
            stages.seconds.clear()
            start = time.process_time()
            batch = controller.rollout(step)
            num_tokens = len(batch.tokens)
            share_out(batch, MINI_BATCHES, stages, f"{MINI_BATCHES} mini-batches")
            share_out(batch, 1, stages, "1 mini-batch")
            del batch
            controller.record(step, num_updates=step, metrics={})
            whole = time.process_time() - start
    controller.close()
    rest = whole - sum(stages.seconds.values())
    return {
        "M tokens": num_tokens / 1e6,
        **dict(sorted(stages.seconds.items())),
        "rest": rest,
        "sum of CPU s": whole,
        "peak GiB": memory.peak_bytes / 2**30,
    }


def test_cpu_time_and_peak_memory_of_rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    give_freed_memory_back()
    columns = {}
    for name, (scale, divisor) in RUNS.items():
        folder = tmp_path / str(len(columns))
        folder.mkdir()
        with monkeypatch.context() as patch:
            columns[name] = measure(folder, scale, divisor, patch)
        gc.collect()
    first, *_, last = list(columns)[1:]
    rows = [
        {
            "CPU s a step": stage,
            **{name: column[stage] for name, column in columns.items()},
            "exponent": math.log10(max(columns[last][stage], 1e-9) / max(columns[first][stage], 1e-9)),
        }
        for stage in columns[first]
    ]
    with capsys.disabled():
        report("controller", f"Rank 0, {GROUPS} × {GROUP_SIZE} samples a step and more; exponent 1 is linear", rows)
