"""One token a row from logits, with its log-prob: the sampling law of the embedded engine.

Change here: how temperature, top-k and top-p act. The order is that of vLLM and transformers: temperature, then top-k,
then top-p on what is left. Log-probs are of the law before top-k and top-p, as SGLang reports them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dapo_mcore.types import SamplingParams

_LARGEST_UNIFORM = 1.0 - 2.0**-40  # keeps `uniform * total` below the total after rounding


def draw_tokens(logits: Tensor, uniforms: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Tokens int64 [B] and their log-probs float32 [B] under softmax(logits / temperature).

    logits    [B, V], any float type; the arithmetic is fp32, the cumulative sum fp64.
    uniforms  float64 [B] in [0, 1): row b's token is the inverse of its cumulative law at uniforms[b], so a row's draw
              does not depend on which other rows are in the batch.
    Temperature 0 takes the largest logit, with the log-prob of the law at temperature 1.
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
    return torch.searchsorted(cumulative, points, right=True)[:, 0]


def _restrict(probs: Tensor, top_k: int, top_p: float) -> Tensor:
    """`probs` [B, V] with the tokens outside top-k (off when < 1) and top-p (off at 1) set to 0; not renormalised."""
    if top_k < 1 and top_p >= 1:
        return probs
    ordered, tokens = probs.sort(dim=-1, descending=True, stable=True)
    if top_k > 0:
        ordered[:, top_k:] = 0
    before = ordered.cumsum(-1) - ordered
    # The most likely token has nothing before it, so it always stays.
    ordered[before >= top_p * ordered.sum(-1, keepdim=True)] = 0
    return torch.zeros_like(probs).scatter_(-1, tokens, ordered)
