"""The in-process rollout engine: a transformers model and a batched decode loop, for CPUs and small models.

Change here: how the embedded engine batches, decodes and takes weights. The sampling law is in draw.py.
It speaks the same protocol and eats the same weight stream as a server engine, so that a run on a laptop goes through
the code that a cluster runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig

from dapo_mcore.architecture.hf_views import hf_views
from dapo_mcore.architecture.manifest import WeightManifest
from dapo_mcore.errors import RolloutError
from dapo_mcore.rollout.draw import draw_tokens
from dapo_mcore.rollout.sampling.limits import check_prompts
from dapo_mcore.types import Rollout, SamplingParams

# Dropping finished rows copies the whole cache, computing them wastes their share: copy once a quarter is finished.
_COMPACT_BELOW = 0.75


class EmbeddedEngine:
    """Generates with a transformers causal language model that has no weights until `update_weights` brings some.

    hf_config       architecture; built in `dtype` on `device`.
    stop_token_ids  any of them ends a response and is its last token.
    pad_token_id    fills the left of shorter prompts; attention never sees it.
    max_batch       sequences decoded at once.
    num_threads     CPU threads during `generate` only; None takes all cores this process may use.

    Repeatable: equal weights, prompts (and their order), parameters, `max_batch`, number of threads and torch build give
    equal rollouts. The random numbers depend on the seed and a row's place in its batch alone; the number of threads
    only enters through the rounding of matrix products, which may flip a draw that lies on a border.

    `on_progress`, when set, is called with the number of sequences that have just finished: `progress.advance` fits.
    """

    def __init__(
        self,
        hf_config: PretrainedConfig,
        *,
        stop_token_ids: tuple[int, ...],
        pad_token_id: int,
        dtype: torch.dtype = torch.float32,
        max_batch: int,
        num_threads: int | None,
        device: str = "cpu",
    ):
        self.on_progress: Callable[[int], None] | None = None
        self._device, self._max_batch, self._pad = torch.device(device), max_batch, pad_token_id
        self._num_threads = num_threads or _available_cores()
        with torch.random.fork_rng(devices=[]):  # the initial weights are thrown away; don't consume the caller's RNG
            model = AutoModelForCausalLM.from_config(hf_config, attn_implementation="sdpa", dtype=dtype)
        self._model = model.to(self._device).eval().requires_grad_(False)
        self._vocab, self._context = model.config.vocab_size, model.config.max_position_embeddings
        self._is_stop = self._stop_table(stop_token_ids)
        self._weights, self._manifest = hf_views(self._model), WeightManifest.of_model(self._model)
        self._version = -1

    @property
    def weight_version(self) -> int:
        """The version of the last `update_weights`; -1 before the first, and after one that failed."""
        return self._version

    def generate(self, prompts: Sequence[np.ndarray], params: SamplingParams) -> list[Rollout]:
        """One response for each entry of `prompts` (int32 [T] each), in order.

        Raises RolloutError before the first weights, for an empty prompt, an unknown token, or a prompt that leaves no
        room for `params.max_new_tokens` in the model's positions.
        """
        self._check(prompts, params)
        lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
        responses = _Responses.empty(len(prompts), params.max_new_tokens, self._device)
        generator = torch.Generator(self._device).manual_seed(params.seed)
        # Neighbours of equal length need neither padding nor a mask, which makes attention about twice as fast.
        order = np.argsort(lengths, kind="stable")
        with _cpu_threads(self._num_threads), torch.inference_mode():
            for start in range(0, len(order), self._max_batch):
                batch = self._prefill(prompts, order[start : start + self._max_batch])
                self._decode(batch, params, generator, responses)
        return responses.as_rollouts(self._version)

    def update_weights(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Takes every HF-named tensor of the stream in place, then moves to `version`.

        A tied output head may be absent from the stream; when present it must equal the embedding. Raises RolloutError
        naming unexpected, repeated, missing and misshapen tensors. After any error the engine has no weights, and refuses
        to generate, until it has taken a whole stream. Memory beside the model: a tied head, where the stream has one.
        """
        self._version, heads = -1, {}
        for name, tensor in self._manifest.checked(weights, version):
            if name in self._manifest.tied:
                heads[name] = tensor.detach().clone()  # the sender may reuse its buffers
            else:
                self._weights[name].copy_(tensor)
        for name, head in heads.items():
            owner = self._manifest.tied[name]
            if not torch.equal(head.to(self._weights[owner]), self._weights[owner]):
                raise RolloutError(
                    f"{name} differs from {owner}, but the model ties them; set tie_word_embeddings false"
                )
        self._version = version

    def metrics(self) -> dict[str, float]:
        """Nothing: there is no server to count."""
        return {}

    def close(self) -> None:
        """Nothing to end."""

    def _stop_table(self, stop_token_ids: tuple[int, ...]) -> Tensor:
        """bool [V]: a look-up is cheaper than a comparison with every stop token."""
        for name, token in [("pad_token_id", self._pad), *(("stop token", token) for token in stop_token_ids)]:
            if not 0 <= token < self._vocab:
                raise RolloutError(f"{name} {token} is outside the model's vocabulary of {self._vocab} tokens")
        table = torch.zeros(self._vocab, dtype=torch.bool, device=self._device)
        table[list(stop_token_ids)] = True
        return table

    def _check(self, prompts: Sequence[np.ndarray], params: SamplingParams) -> None:
        if self._version < 0:
            raise RolloutError("the embedded engine has no whole weights; call update_weights before generate")
        check_prompts(prompts, params.max_new_tokens, self._vocab, self._context)

    def _prefill(self, prompts: Sequence[np.ndarray], rows: np.ndarray) -> _Batch:
        """The decoding state after the prompts. Each distinct prompt is computed once, however often it is sampled."""
        distinct: dict[bytes, int] = {}
        chosen = [np.asarray(prompts[row], dtype=np.int64) for row in rows]
        which = torch.tensor([distinct.setdefault(ids.tobytes(), len(distinct)) for ids in chosen], device=self._device)
        ids, mask = _pad_left([np.frombuffer(key, dtype=np.int64) for key in distinct], self._pad)
        ids, mask = ids.to(self._device), None if mask is None else mask.to(self._device)
        positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self._model.config)
        logits = self._forward(ids, cache, mask, positions)
        slots = torch.arange(len(rows), device=self._device)
        batch = _Batch(torch.from_numpy(rows).to(self._device), slots, logits, cache, mask, positions)
        batch.select(which, rows=slots)
        return batch

    def _decode(self, batch: _Batch, params: SamplingParams, generator: torch.Generator, responses: _Responses) -> None:
        """Decodes until every row has stopped or is full, and writes tokens and log-probs into `responses`."""
        size = len(batch.rows)
        alive, num_alive = torch.ones(size, dtype=torch.bool, device=self._device), size
        for step in range(params.max_new_tokens):
            # One number for every row of the batch, finished or not: a row's draws don't depend on its neighbours' ends.
            uniforms = torch.rand(size, dtype=torch.float64, generator=generator, device=self._device)
            tokens, logprobs = draw_tokens(batch.logits, uniforms[batch.slots], params)
            stopped = self._is_stop[tokens]
            responses.write(step, batch.rows, tokens, logprobs, alive, stopped)
            alive &= ~stopped if step + 1 < params.max_new_tokens else False
            num_before, num_alive = num_alive, int(alive.sum())
            if self.on_progress and num_alive < num_before:
                self.on_progress(num_before - num_alive)
            if num_alive == 0:
                return
            if num_alive < _COMPACT_BELOW * len(tokens):
                keep = alive.nonzero()[:, 0]
                batch.select(keep, rows=keep)
                tokens, alive = tokens[keep], alive[keep]
            batch.extend_mask()
            batch.logits = self._forward(tokens[:, None], batch.cache, batch.mask, batch.positions)

    def _forward(self, ids: Tensor, cache: DynamicCache, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        """Logits [B, V] of the last position; `cache` grows by the columns of `ids`."""
        return self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]


@dataclass
class _Batch:
    """Rows being decoded. `rows` index the call's prompts, `slots` the batch as it began; mask None means no padding."""

    rows: Tensor
    slots: Tensor
    logits: Tensor
    cache: DynamicCache
    mask: Tensor | None
    positions: Tensor | None

    def select(self, index: Tensor, rows: Tensor) -> None:
        """Keeps entries `index` of the model's state and entries `rows` of the bookkeeping."""
        self.cache.batch_select_indices(index)
        self.logits = self.logits[index]
        self.rows, self.slots = self.rows[rows], self.slots[rows]
        if self.mask is not None:
            self.mask, self.positions = self.mask[index], self.positions[index]

    def extend_mask(self) -> None:
        """Makes room for one more token in a padded batch."""
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
            self.positions = self.positions[:, -1:] + 1


@dataclass
class _Responses:
    """The results of one call, written in place: tokens and logprobs [B, max_new_tokens], lengths and stopped [B]."""

    tokens: Tensor
    logprobs: Tensor
    lengths: Tensor
    stopped: Tensor

    @classmethod
    def empty(cls, size: int, max_new_tokens: int, device: torch.device) -> _Responses:
        return cls(
            tokens=torch.zeros(size, max_new_tokens, dtype=torch.int32, device=device),
            logprobs=torch.zeros(size, max_new_tokens, dtype=torch.float32, device=device),
            lengths=torch.zeros(size, dtype=torch.int64, device=device),
            stopped=torch.zeros(size, dtype=torch.bool, device=device),
        )

    def write(self, step: int, rows: Tensor, tokens: Tensor, logprobs: Tensor, alive: Tensor, stopped: Tensor) -> None:
        """Records a step. What a finished row goes on writing lies beyond its length and is cut off at the end."""
        self.tokens[rows, step] = tokens.int()
        self.logprobs[rows, step] = logprobs
        self.lengths[rows] += alive
        self.stopped[rows] |= alive & stopped

    def as_rollouts(self, version: int) -> list[Rollout]:
        tokens, logprobs = self.tokens.cpu().numpy(), self.logprobs.cpu().numpy()
        return [
            Rollout(
                token_ids=tokens[row, :length].copy(),
                logprobs=logprobs[row, :length].copy(),
                loss_mask=np.ones(length, dtype=bool),
                finish_reason="stop" if stopped else "length",
                weight_version=version,
            )
            for row, (length, stopped) in enumerate(zip(self.lengths.tolist(), self.stopped.tolist()))
        ]


def _pad_left(prompts: list[np.ndarray], pad: int) -> tuple[Tensor, Tensor | None]:
    """Token ids int64 [B, T] and their mask int64 [B, T], or None for the mask when all lengths are equal."""
    width = max(map(len, prompts))
    ids = np.full((len(prompts), width), pad, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return torch.from_numpy(ids), None if mask.all() else torch.from_numpy(mask)


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _cpu_threads(num_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
