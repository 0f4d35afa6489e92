"""Mismatch between the rollout engine, which samples, and the actor, which trains: its correction and its metrics.

Change here: the importance weights against the mismatch, and what is reported about it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dapo_mcore.config.algo import TISConfig
from dapo_mcore.errors import RolloutError

LOG_RATIO_LIMIT = 20.0
BINS_PER_DECADE = 40
NUM_IMPORTANCE_SUMS = 5
FIRST_DECADE, LAST_DECADE = -7, 2
_NUM_BINS = (LAST_DECADE - FIRST_DECADE) * BINS_PER_DECADE + 2  # between the edges, and one at either end
UNCORRECTED = TISConfig(mode="off")
LARGEST_USUAL_MISMATCH = 0.1
"""Nats. bf16 on both sides gives a mean of about 1e-2; wrong weights on a server give 0.1 and more."""


def importance_weights(
    old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, tis: TISConfig
) -> torch.Tensor | None:
    """Return the weights that multiply the policy term, float32 of the inputs' shape, detached; None if the mode is off.

    With w = exp(old - rollout), the exponent clamped to ±20:
      truncate  w clamped to [lower, cap]         truncated importance sampling (TIS)
      icepop    w where lower ≤ w ≤ cap, else 0   tokens on which engine and actor disagree have no gradient
      mask      1 where lower ≤ w ≤ cap, else 0
    Without `lower` it is 0 in mode truncate, else 1/cap; without `cap` there is no upper bound. The weights do not multiply the KL
    and the entropy, and a token of weight 0 still counts in the loss's divisor.
    Sources: verl b178a3c (trainer/ppo/rollout_corr_helper.py), which only truncates; slime 624b824
    (backends/megatron_utils/loss.py: vanilla_tis_function and icepop_function, whose lower bound is 0 unless it is set;
    examples/train_infer_mismatch_helper/mis.py: truncate, clip, and mask, which is icepop here, except that its masked tokens have
    no KL and no entropy term); NeMo-RL 7ea279a (algorithms/loss/loss_functions.py: tis, icepop, or no bound). slime's first two and
    NeMo-RL do not clamp the exponent, and in NeMo-RL a weight that overflows is 0.
    `old_logprobs` are the actor's. With algo.old_logprobs=rollout there are none: pass the log-probs of the training
    forward pass (mode mask only).
    """
    return None if tis.mode == "off" else weights_of(_log_ratio(old_logprobs, rollout_logprobs), tis)


def weights_of(log_ratios: torch.Tensor, tis: TISConfig) -> torch.Tensor:
    """Return the weights of given log w, clamped to ±20: of tokens as in `importance_weights`, or of whole responses."""
    if tis.mode == "truncate":
        return log_ratios.exp().clamp(tis.lower or 0.0, math.inf if tis.cap is None else tis.cap)
    # The comparison of logarithms is exact at the bounds, and symmetric.
    high = torch.tensor(math.inf if tis.cap is None else tis.cap, dtype=log_ratios.dtype).log()
    low = -high if tis.lower is None else torch.tensor(tis.lower, dtype=log_ratios.dtype).log()
    inside = (low <= log_ratios) & (log_ratios <= high)
    return inside.to(log_ratios.dtype) if tis.mode == "mask" else log_ratios.exp() * inside


def importance_sums(old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, tis: TISConfig) -> torch.Tensor:
    """Return float64 [5] over one rank's loss tokens: their number, Σ exp(old - rollout), Σ w, Σ w², and the number of
    tokens whose weight a bound has changed or made 0; w is what `importance_weights` returns. All are 0 if the mode is off. Ranks
    combine them by an all-reduce with SUM.

    Example: ratios 1 and 4, truncated at 2, give [2, 5, 3, 5, 1].
    """
    if tis.mode == "off":
        return old_logprobs.new_zeros(NUM_IMPORTANCE_SUMS, dtype=torch.float64)
    return importance_sums_of(_log_ratio(old_logprobs, rollout_logprobs), tis)


def importance_sums_of(log_ratios: torch.Tensor, tis: TISConfig) -> torch.Tensor:
    """Return the same of loss tokens whose log w are given, each that of its token or of its response."""
    ratios, weights = log_ratios.exp(), weights_of(log_ratios, tis)
    limited = weights != ratios if tis.mode == "truncate" else weights == 0
    ratios, weights = ratios.double(), weights.double()
    count = weights.new_full((), weights.numel())
    return torch.stack([count, ratios.sum(), weights.sum(), weights.square().sum(), limited.sum().double()])


def importance_metrics(sums: torch.Tensor) -> dict[str, float]:
    """Return the `tis/…` metrics of the `importance_sums` of N loss tokens; {} if N is 0.

    The effective sample size is (Σ w)² / (N Σ w²): 1 if all weights are equal, 1/N if one token has all the weight.
    Source: Kish, Survey Sampling (1965).
    """
    count, ratios, weights, squares, limited = sums.tolist()
    if count == 0:
        return {}
    return {
        "tis/weight_mean_before": ratios / count,
        "tis/weight_mean_after": weights / count,
        "tis/truncated_ratio": limited / count,
        "tis/effective_sample_size": weights**2 / (count * squares) if squares else 0.0,
    }


@dataclass(frozen=True)
class MismatchStats:
    """Partial statistics of |Δ log p| over one rank's loss tokens; ranks combine them with two all-reduces.

    sums     float64 [3 + 5 + bins]: Σ|Δ|, Σ k3, number of tokens, the importance_sums, then the histogram of |Δ|: all-reduce
             with SUM.
    maximum  float64 [1]: all-reduce with MAX.
    Example: two tokens with Δ = 0 and 0.1 and no correction have sums [0.1, 0.00517, 2, 0, 0, 0, 0, 0, 1, …, 1, …] and
    maximum [0.1].
    """

    sums: torch.Tensor
    maximum: torch.Tensor

    @property
    def importance(self) -> torch.Tensor:
        return self.sums[3 : 3 + NUM_IMPORTANCE_SUMS]

    @property
    def histogram(self) -> torch.Tensor:
        return self.sums[3 + NUM_IMPORTANCE_SUMS :]

    def __add__(self, other: MismatchStats) -> MismatchStats:
        return MismatchStats(self.sums + other.sums, torch.maximum(self.maximum, other.maximum))


def mismatch_stats(
    actor_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, tis: TISConfig = UNCORRECTED
) -> MismatchStats:
    """Return the statistics of one rank's loss tokens (float [L] each; L may be 0), on the inputs' device.

    tis  the correction (algo.tis) whose importance_sums they hold.
    """
    log_ratio = _log_ratio(actor_logprobs, rollout_logprobs).double()
    distance = (actor_logprobs - rollout_logprobs).detach().double().abs()
    # The engine sampled the tokens, so this estimates KL(engine ‖ actor).
    k3 = (log_ratio.expm1() - log_ratio).sum()
    # no bincount: it makes the host wait for a GPU
    histogram = distance.new_zeros(_NUM_BINS).index_add_(0, _bins(distance), torch.ones_like(distance))
    head = torch.stack([distance.sum(), k3, k3.new_full((), distance.numel())])
    maximum = distance.max().reshape(1) if distance.numel() else distance.new_zeros(1)
    importance = importance_sums(actor_logprobs, rollout_logprobs, tis)
    return MismatchStats(torch.cat([head, importance, histogram]), maximum)


def mismatch_metrics(total: MismatchStats) -> dict[str, float]:
    """Return mean, 99th percentile, maximum and histogram of |Δ log p|, the k3 estimate of KL(engine ‖ actor), and the
    importance_metrics of the correction if there is one, over all loss tokens; {} if there are none.

    The percentile is the upper edge of its histogram bin: up to 6 % too high, never too low, 1e-7 for anything smaller, and at most
    the maximum. For the histogram see `histogram_shares`.
    """
    distance_sum, k3_sum, count = total.sums[:3].tolist()
    if count == 0:
        return {}
    maximum = total.maximum.item()
    return {
        "mismatch/logprob_diff_mean": distance_sum / count,
        "mismatch/logprob_diff_p99": min(_percentile(total.histogram, 0.99), maximum),
        "mismatch/logprob_diff_max": maximum,
        "mismatch/k3_kl": k3_sum / count,
        **histogram_shares(total.histogram),
        **importance_metrics(total.importance),
    }


def histogram_shares(histogram: torch.Tensor) -> dict[str, float]:
    """Return the share of tokens in each decade of |Δ log p|; `mismatch/from_1e-3` is the share in (1e-3, 1e-2].

    The shares sum to 1. `from_0` ends where the first decade begins, and the last decade has no upper end.
    """
    decades = range(FIRST_DECADE, LAST_DECADE + 1)
    inner = histogram[1:-1].reshape(-1, BINS_PER_DECADE).sum(1)
    counts = torch.cat([histogram[:1], inner, histogram[-1:]])
    names = ["mismatch/from_0", *(f"mismatch/from_1e{decade}" for decade in decades)]
    return dict(zip(names, (counts / counts.sum()).tolist(), strict=True))


def check_mismatch(metrics: Mapping[str, float], limit: float | None) -> None:
    """Raise RolloutError if the mean |Δ log p| exceeds `limit` (algo.max_mismatch) or is NaN.

    metrics  what mismatch_metrics returned; {} if there were no loss tokens.
    """
    if limit is None or not metrics or metrics["mismatch/logprob_diff_mean"] <= limit:
        return
    raise RolloutError(
        f"rollout engine and actor disagree: |log-prob difference| over the step's loss tokens has mean "
        f"{metrics['mismatch/logprob_diff_mean']:.3g} nats, p99 {metrics['mismatch/logprob_diff_p99']:.3g}, maximum "
        f"{metrics['mismatch/logprob_diff_max']:.3g}, and k3 KL {metrics['mismatch/k3_kl']:.3g}, but algo.max_mismatch "
        f"allows a mean of {limit:g}; compare dtypes, temperature and weights of the two, or raise the limit"
    )


def mismatch_warning(metrics: Mapping[str, float]) -> str | None:
    """Return a warning if rounding cannot explain the mean |Δ log p|; None if it is usual or was not measured.

    metrics  those of a step whose samples were all generated with the actor's current weights.
    """
    mean = metrics.get("mismatch/logprob_diff_mean", 0.0)
    if mean <= LARGEST_USUAL_MISMATCH:
        return None
    return (
        f"WARNING: rollout engine and trainer disagree about the same tokens: mean |log-prob difference| is {mean:.3g} nats, "
        f"p99 {metrics['mismatch/logprob_diff_p99']:.3g}, and more than {LARGEST_USUAL_MISMATCH:g} is hardly rounding, so "
        f"training may be off-policy from the start; usual causes: weights that the server did not load (an output head, for "
        f"instance), another dtype or model config on the server, FP8; algo.max_mismatch={LARGEST_USUAL_MISMATCH:g} ends a "
        f"run instead"
    )


def _log_ratio(actor_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor) -> torch.Tensor:
    return (actor_logprobs - rollout_logprobs).detach().float().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def _bins(distance: torch.Tensor) -> torch.Tensor:
    """Return int64, the number of edges below each distance: a bin holds its upper edge. NaN is in the last one.

    By logarithm: torch.bucketize takes eight times as long on a CPU.
    """
    above = (distance.log10() - FIRST_DECADE) * BINS_PER_DECADE
    return above.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).ceil_().clamp_(0, _NUM_BINS - 1).long()


def _bin_edges() -> torch.Tensor:
    return torch.logspace(FIRST_DECADE, LAST_DECADE, _NUM_BINS - 1, dtype=torch.float64)


def _percentile(histogram: torch.Tensor, fraction: float) -> float:
    """Return the upper edge of the first bin up to which at least `fraction` of the tokens lie."""
    reached = histogram.cumsum(0)
    bin_index = int(torch.searchsorted(reached, fraction * reached[-1]))
    edges = _bin_edges()
    return edges[bin_index].item() if bin_index < len(edges) else float("inf")
