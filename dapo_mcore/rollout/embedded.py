"""The in-process rollout engine: a transformers model and a batched decode loop, for CPUs and small models.

Change here: how the embedded engine batches, decodes, samples (temperature, top-k, top-p) and loads weights.
It has the interface of a server engine and reads the same weight stream, so a run on a laptop uses the code that a
cluster runs.
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
from dapo_mcore.data.stops import StopTexts
from dapo_mcore.errors import RolloutError
from dapo_mcore.rollout.sampling.limits import check_prompts
from dapo_mcore.types import Rollout, SamplingParams

# Dropping finished rows copies the whole cache, and computing them is wasted: drop them once a quarter is finished.
_COMPACT_BELOW = 0.75
_LARGEST_UNIFORM = 1.0 - 2.0**-40  # keeps `uniform * total` below the total after rounding


class EmbeddedEngine:
    """A transformers causal language model that generates. It has no weights before the first `update_weights`.

    hf_config       architecture; the model is built in `dtype` on `device`.
    stop_token_ids  each of them ends a response and is its last token.
    stop_texts      each of them ends a response, with the token that completes it.
    pad_token_id    fills the left of shorter prompts; attention never sees it.
    max_batch       number of sequences decoded at once.
    num_threads     CPU threads during `generate` only; None takes all cores that this process may use.

    Repeatable: equal weights, prompts (in equal order), parameters, `max_batch`, number of threads and torch build give
    equal rollouts. The random numbers depend only on the seed and a row's index in its batch. The number of threads
    changes the rounding of matrix products, which may change a token whose uniform lies on a boundary.

    `on_progress`, if set, is called with the number of sequences that have just finished.
    """

    def __init__(
        self,
        hf_config: PretrainedConfig,
        *,
        stop_token_ids: tuple[int, ...],
        stop_texts: StopTexts | None = None,
        pad_token_id: int,
        dtype: torch.dtype = torch.float32,
        max_batch: int,
        num_threads: int | None,
        device: str = "cpu",
    ):
        self.on_progress: Callable[[int], None] | None = None
        self._device, self._max_batch, self._pad = torch.device(device), max_batch, pad_token_id
        self._num_threads = num_threads or _available_cores()
        with torch.random.fork_rng(devices=[]):  # keeps the caller's RNG: the initial weights are discarded
            model = AutoModelForCausalLM.from_config(hf_config, attn_implementation="sdpa", dtype=dtype)
        self._model = model.to(self._device).eval().requires_grad_(False)
        self._vocab, self._context = model.config.vocab_size, model.config.max_position_embeddings
        self._is_stop = self._stop_table(stop_token_ids)
        self._stop_texts, self._may_end = stop_texts, self._may_end_table(stop_texts)
        self._weights, self._manifest = hf_views(self._model), WeightManifest.of_model(self._model)
        self._version = -1

    @property
    def weight_version(self) -> int:
        """Return the version of the last `update_weights`; -1 before the first, and after one that failed."""
        return self._version

    def generate(
        self, prompts: Sequence[np.ndarray], params: SamplingParams, limits: Sequence[int] | None = None
    ) -> list[Rollout]:
        """Return one response for each entry of `prompts` (int32 [T] each), in order.

        limits  most tokens of each response, at most params.max_new_tokens; None: as many for all.
        Raise RolloutError before the first weights, and for a prompt that `check_prompts` refuses.
        """
        allowed = np.full(len(prompts), params.max_new_tokens) if limits is None else np.array(limits, np.int64)
        self._check(prompts, allowed)
        lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
        responses = _Responses.empty(len(prompts), params.max_new_tokens, self._device)
        generator = torch.Generator(self._device).manual_seed(params.seed)
        # Prompts of equal length need no padding and no mask, which makes attention about twice as fast.
        order = np.argsort(lengths, kind="stable")
        with _cpu_threads(self._num_threads), torch.inference_mode():
            for start in range(0, len(order), self._max_batch):
                batch = self._prefill(prompts, order[start : start + self._max_batch])
                self._decode(batch, params, torch.from_numpy(allowed).to(self._device), generator, responses)
        return responses.as_rollouts(self._version, params.seed)

    def update_weights(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Copy every HF-named tensor of the stream into the model, then set the weight version to `version`.

        A tied output head may be missing in the stream; if it is there, it must equal the embedding. Raise RolloutError
        that names unexpected, repeated, missing and misshapen tensors. After an error the engine has no weights and
        refuses to generate until it gets a whole stream. Extra memory: a tied head, if the stream has one.
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
        """Return {}: there are no servers to report about."""
        return {}

    def close(self) -> None:
        """Do nothing: there is no process to end."""

    def _stop_table(self, stop_token_ids: tuple[int, ...]) -> Tensor:
        """Return bool [V], True for stop tokens: one look-up is cheaper than a comparison with each of them."""
        for name, token in [("pad_token_id", self._pad), *(("stop token", token) for token in stop_token_ids)]:
            if not 0 <= token < self._vocab:
                raise RolloutError(f"{name} {token} is outside the model's vocabulary of {self._vocab} tokens")
        table = torch.zeros(self._vocab, dtype=torch.bool, device=self._device)
        table[list(stop_token_ids)] = True
        return table

    def _may_end_table(self, texts: StopTexts | None) -> Tensor | None:
        """Return bool [V], True for tokens after which a stop text is looked for; None without texts."""
        if texts is None:
            return None
        table = torch.zeros(self._vocab, dtype=torch.bool)
        known = torch.from_numpy(texts.may_end)[: self._vocab]
        table[: len(known)] = known
        return table.to(self._device)

    def _completes_text(
        self, step: int, batch: _Batch, tokens: Tensor, alive: Tensor, responses: _Responses
    ) -> Tensor | bool:
        """Return bool [B], True for the live rows in which this step's token completes a stop text."""
        if self._may_end is None or self._stop_texts is None:
            return False
        ended = torch.zeros_like(alive)
        rows = (self._may_end[tokens] & alive).nonzero()[:, 0]
        if len(rows):
            before = responses.tokens[batch.rows[rows], max(0, step + 1 - self._stop_texts.window) : step]
            tails = torch.cat([before, tokens[rows, None].int()], dim=1).cpu().numpy()
            ended[rows] = torch.tensor(self._stop_texts.ended(list(tails)), device=self._device)
        return ended

    def _check(self, prompts: Sequence[np.ndarray], limits: np.ndarray) -> None:
        if self._version < 0:
            raise RolloutError("the embedded engine has no complete weights; call update_weights before generate")
        check_prompts(prompts, limits, self._vocab, self._context)

    def _prefill(self, prompts: Sequence[np.ndarray], rows: np.ndarray) -> _Batch:
        """Return the decoding state after the prompts. Each distinct prompt is computed once."""
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

    def _decode(
        self,
        batch: _Batch,
        params: SamplingParams,
        limits: Tensor,
        generator: torch.Generator,
        responses: _Responses,
    ) -> None:
        """Decode until every row has stopped or has as many tokens as `limits` [P] allows its prompt, and write tokens and log-probs
        into `responses`."""
        size = len(batch.rows)
        alive, num_alive = torch.ones(size, dtype=torch.bool, device=self._device), size
        for step in range(params.max_new_tokens):
            # One number for every row, finished or not: a row's tokens do not depend on when other rows finish.
            uniforms = torch.rand(size, dtype=torch.float64, generator=generator, device=self._device)
            tokens, logprobs = draw_tokens(batch.logits, uniforms[batch.slots], params)
            stopped = self._is_stop[tokens] | self._completes_text(step, batch, tokens, alive, responses)
            responses.write(step, batch.rows, tokens, logprobs, alive, stopped)
            alive &= ~stopped & (limits[batch.rows] > step + 1)
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
        """Return the logits [B, V] of the last position. `cache` grows by the columns of `ids`."""
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
    """Rows being decoded. `rows` are indices of the call's prompts, `slots` of the whole batch; mask None: no padding."""

    rows: Tensor
    slots: Tensor
    logits: Tensor
    cache: DynamicCache
    mask: Tensor | None
    positions: Tensor | None

    def select(self, index: Tensor, rows: Tensor) -> None:
        """Keep entries `index` of the model's state and entries `rows` of the index tensors."""
        self.cache.batch_select_indices(index)
        self.logits = self.logits[index]
        self.rows, self.slots = self.rows[rows], self.slots[rows]
        if self.mask is not None:
            self.mask, self.positions = self.mask[index], self.positions[index]

    def extend_mask(self) -> None:
        """Extend mask and positions of a padded batch by one token."""
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
            self.positions = self.positions[:, -1:] + 1


@dataclass
class _Responses:
    """Results of one call, written in place: tokens and logprobs [B, max_new_tokens], lengths and stopped [B]."""

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
        """Write one decoding step. What a finished row still writes lies beyond its length and is dropped."""
        self.tokens[rows, step] = tokens.int()
        self.logprobs[rows, step] = logprobs
        self.lengths[rows] += alive
        self.stopped[rows] |= alive & stopped

    def as_rollouts(self, version: int, seed: int) -> list[Rollout]:
        tokens, logprobs = self.tokens.cpu().numpy(), self.logprobs.cpu().numpy()
        return [
            Rollout(
                token_ids=tokens[row, :length].copy(),
                logprobs=logprobs[row, :length].copy(),
                loss_mask=np.ones(length, dtype=bool),
                finish_reason="stop" if stopped else "length",
                weight_version=version,
                seed=seed,
            )
            for row, (length, stopped) in enumerate(zip(self.lengths.tolist(), self.stopped.tolist()))
        ]


def _pad_left(prompts: list[np.ndarray], pad: int) -> tuple[Tensor, Tensor | None]:
    """Return token ids int64 [B, T] and their mask int64 [B, T], or None for the mask if all lengths are equal."""
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


def draw_tokens(logits: Tensor, uniforms: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Return one token per row, int64 [B], drawn from softmax(logits / temperature), and its log-prob, float32 [B].

    logits    [B, V], any float type; the arithmetic is fp32, the cumulative sum fp64.
    uniforms  float64 [B] in [0, 1): row b's token is the inverse of its cumulative distribution at uniforms[b], so a
              row's token does not depend on the other rows of the batch.
    Temperature first, then top-k, then top-p on what is left, as in vLLM and transformers. Log-probs are those before
    top-k and top-p, as SGLang reports them. Temperature 0 takes the largest logit, with its log-prob at temperature 1.
    """
    if params.temperature == 0:
        logprobs = logits.float().log_softmax(-1)
        tokens = logprobs.argmax(-1)
    else:
        logprobs = (logits.float() / params.temperature).log_softmax(-1)
        tokens = _invert(_restrict(logprobs.exp(), params.top_k, params.top_p), uniforms)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    cumulative = weights.double().cumsum(-1)
    points = uniforms.clamp(max=_LARGEST_UNIFORM)[:, None] * cumulative[:, -1:]
    # right=True: the first token whose cumulative weight exceeds the point, so never one of weight 0.
    tokens = torch.searchsorted(cumulative, points, right=True)[:, 0]
    return tokens.clamp_(
        max=weights.size(-1) - 1
    )  # a row of NaN finds none; its log-prob is NaN, which masks the sample


def _restrict(probs: Tensor, top_k: int, top_p: float) -> Tensor:
    """Return `probs` [B, V] with 0 for tokens outside top-k (off below 1) and top-p (off at 1). Not renormalised."""
    if top_k < 1 and top_p >= 1:
        return probs
    ordered, tokens = probs.sort(dim=-1, descending=True, stable=True)
    if top_k > 0:
        ordered[:, top_k:] = 0
    before = ordered.cumsum(-1) - ordered
    # The most likely token has nothing before it, so it always stays.
    ordered[before >= top_p * ordered.sum(-1, keepdim=True)] = 0
    return torch.zeros_like(probs).scatter_(-1, tokens, ordered)
