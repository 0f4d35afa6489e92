"""Every metric of a run, and the ones computed from groups.

Change here: what a metric is called, its unit and its meaning (METRICS is the one table; sinks, live view, plots and
docs use its names), and the statistics of rewards and response lengths.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:  # types imports torch, which reading or plotting metrics does not need
    from dapo_mcore.types import Group, Sample


_UNPARSED = ("", "[INVALID]")  # the second is what verl's math_dapo, and ours, calls a response without an answer


class Metric(NamedTuple):
    """What one number of a rollout step is. The unit is empty where there is none."""

    unit: str
    meaning: str


METRICS: dict[str, Metric] = {
    "reward/mean": Metric("", "score plus overlong penalty, mean over generated samples that were scored"),
    "reward/std": Metric("", "population standard deviation of the same"),
    "reward/score_mean": Metric("", "raw score of the answer, without the penalty"),
    "reward/overlong_penalty_mean": Metric("", "soft overlong punishment, 0 or negative"),
    "reward/acc": Metric("fraction", "correct answers among generated samples that were scored"),
    "reward/acc_kept": Metric("fraction", "correct answers among the scored samples of kept groups"),
    "reward/failures": Metric(
        "samples", "generated samples whose scoring failed (time-out, exception, NaN), masked or not"
    ),
    "reward/groups_one_scored": Metric(
        "groups", "trained groups of several samples of which one was scored: it has no baseline, so its advantage is 0"
    ),
    "reward/unparsed_ratio": Metric("fraction", "scored samples from which the reward function extracted no answer"),
    "response_length/mean": Metric("tokens", "response length of generated samples, tool output included"),
    "response_length/max": Metric("tokens", "longest response"),
    "response_length/min": Metric("tokens", "shortest response"),
    "response_length/truncated_ratio": Metric("fraction", "responses cut at rollout.max_response_tokens"),
    "sampling/groups_generated": Metric("groups", "groups finished in this step"),
    "sampling/groups_kept": Metric("groups", "groups trained on"),
    "sampling/groups_all_right": Metric("groups", "groups without signal: every answer right"),
    "sampling/groups_all_wrong": Metric("groups", "groups without signal: every answer wrong"),
    "sampling/kept_ratio": Metric("fraction", "groups whose answers vary among groups generated"),
    "sampling/gen_batches": Metric("batches", "generation rounds, or groups begun over the size of one"),
    "sampling/generated_tokens": Metric("tokens", "response tokens generated in this step"),
    "sampling/surplus_reused": Metric("groups", "groups trained on that an earlier step had generated"),
    "sampling/surplus_carried": Metric("groups", "good groups beyond the training batch, kept for the next step"),
    "sampling/surplus_dropped": Metric("groups", "carried groups that became too stale, or surplus thrown away"),
    "sampling/groups_stale": Metric(
        "groups", "groups dropped because they were older than sampling.max_staleness allows"
    ),
    "sampling/groups_aborted": Metric("groups", "groups ended unfinished by sampling.on_full abort; asked again later"),
    "sampling/groups_pending": Metric(
        "groups", "groups in flight at the end of the step, which sampling.on_full keep goes on with in the next"
    ),
    "sampling/in_flight_mean": Metric("groups", "groups that servers worked on, mean over the time of generation"),
    "sampling/in_flight_max": Metric("groups", "the most of them"),
    "sampling/surplus_wait_s": Metric("s", "wait for groups in flight after enough were kept"),
    "sampling/staleness_mean": Metric(
        "versions", "versions of trained groups behind the policy that trains on them, mean"
    ),
    "sampling/staleness_max": Metric("versions", "maximum of the same"),
    "sampling/token_staleness_mean": Metric("versions", "the same of each token of these groups by itself, mean"),
    "sampling/samples_resumed": Metric("samples", "trained responses that weights of several versions generated"),
    "sampling/resample_rate": Metric("fraction", "responses added to uniform groups, among all responses generated"),
    "sampling/samples_generated": Metric("samples", "responses generated in this step"),
    "actor/loss": Metric("", "policy loss as optimised, mean over the step's updates"),
    "actor/skipped_updates": Metric("updates", "gradient steps left out because the gradient was not finite"),
    "actor/nll": Metric("nats", "negative log-prob of the loss tokens, mean"),
    "actor/entropy": Metric("nats", "entropy of the policy, mean over loss tokens"),
    "actor/grad_norm": Metric("", "gradient norm before clipping, mean over the step's updates"),
    "actor/lr": Metric("", "learning rate of the step's last update"),
    "actor/clip_low": Metric("fraction", "loss tokens whose gradient the lower clip removed"),
    "actor/clip_high": Metric("fraction", "loss tokens whose gradient the upper clip removed"),
    "actor/clip_dual": Metric("fraction", "loss tokens whose loss the dual clip capped"),
    "actor/ppo_kl": Metric("nats", "mean of old minus new log-prob over loss tokens"),
    "actor/ratio_max_deviation": Metric("", "largest |ratio - 1| of the step"),
    "actor/first_update_ratio_deviation": Metric("", "largest |ratio - 1| before the first update; 0 in exact maths"),
    "actor/ref_kl": Metric("nats", "KL to the starting policy, by algo.kl.estimator"),
    "mismatch/logprob_diff_mean": Metric("nats", "|log-prob of actor - of rollout engine|, mean over loss tokens"),
    "mismatch/logprob_diff_p99": Metric("nats", "99th percentile of the same, from a histogram: at most 6 % too high"),
    "mismatch/logprob_diff_max": Metric("nats", "maximum of the same"),
    "mismatch/k3_kl": Metric("nats", "k3 estimate of KL(rollout engine ‖ actor) over loss tokens"),
    "mismatch/from_<size>": Metric("fraction", "loss tokens by the same, in decades: from this size to ten times it"),
    "tis/weight_mean_before": Metric(
        "", "importance weight exp(actor's log-prob - engine's), mean over loss tokens, before algo.tis cuts it"
    ),
    "tis/weight_mean_after": Metric("", "the weight that multiplies a token's loss, mean over loss tokens"),
    "tis/truncated_ratio": Metric("fraction", "loss tokens whose weight algo.tis cut to the cap, or masked"),
    "tis/effective_sample_size": Metric(
        "fraction", "(Σw)² / (N·Σw²) of these weights over N loss tokens: 1 where all weigh the same"
    ),
    "rollout/servers_serving": Metric("servers", "rollout servers that hold the current weights and take requests"),
    "rollout/retries": Metric("requests", "tries of a sample beyond its first"),
    "rollout/dropped_aborted": Metric("answers", "partial answers of aborted requests, dropped whole and asked again"),
    "rollout/dropped_stale_version": Metric("answers", "answers made by older weights than allowed, dropped"),
    "rollout/dropped_mixed_versions": Metric("answers", "answers during which the weights changed, dropped"),
    "rollout/dropped_unknown_version": Metric("answers", "answers made by weights that this run did not send, dropped"),
    "rollout/dropped_malformed": Metric("answers", "answers without usable tokens or log-probs, dropped"),
    "rollout/servers_suspected": Metric("times", "servers taken out because a request or a health check failed"),
    "rollout/servers_excluded": Metric("times", "servers taken out because a weight update failed on them"),
    "rollout/servers_resynced": Metric("times", "servers that took the current weights before they served again"),
    "rollout/server_restarts": Metric("times", "servers started again"),
    "sync/write_s": Metric("s", "writing weights to rollout.sglang.sync_dir, gathering included"),
    "sync/load_s": Metric("s", "servers loading them from there"),
    "sync/broadcast_s": Metric("s", "broadcasting weights to the servers, gathering included"),
    "sync/tensor_s": Metric("s", "servers copying weights from rank 0's memory, gathering included"),
    "sync/bytes": Metric("bytes", "weights sent to each server"),
    "sync/repeats": Metric("times", "syncs begun again because a server's death broke the broadcast for all"),
    "sync/weights_lost": Metric(
        "times", "syncs in the middle of generation, because the only servers had died and were back without weights"
    ),
    "sync/servers_verified": Metric("servers", "servers whose weights' checksums were compared with another server's"),
    "sync/gb_per_s": Metric("GB/s", "sync/bytes over the time of the whole sync"),
    "sync/release_s": Metric("s", "colocated: servers giving up their memory, which sync/handover_s includes"),
    "sync/resume_s": Metric("s", "colocated: servers taking it back, which sync/handover_s includes"),
    "sync/handover_s": Metric(
        "s", "colocated: memory given up and taken by trainer and servers, the sync itself aside"
    ),
    "perf/tokens_per_s": Metric("tokens/s", "trained tokens (prompt and response) over time/step_s"),
    "perf/generated_tokens_per_s": Metric("tokens/s", "response tokens generated, over time/generate_s"),
    "memory/rss_gib": Metric("GiB", "resident memory of the controller process"),
    "updates": Metric("updates", "gradient steps since the start of the run"),
    "updates_per_step": Metric("updates", "gradient steps of this rollout step"),
    "time/step_s": Metric(
        "s",
        "wall time of the rollout step: generation, training, sync and between them; not start, evaluation and saving",
    ),
    "time/<phase>_s": Metric(
        "s",
        "wall time of generate, reward, filter, logprob, train, wait or sync; with rollout.async_steps the first two "
        "pass beside the step before, which waits for what is left of them",
    ),
    "time/start_s": Metric(
        "s",
        "before the first step, in the run's first row: servers, weights, warm start, the first sync or the checkpoint",
    ),
    "time/eval_s": Metric("s", "evaluation after the step"),
    "time/save_s": Metric("s", "writing the checkpoint or export of the step before"),
    "val/<set>/mean@<k>": Metric("fraction", "accuracy on a validation set, mean over k samples a problem"),
    "val/<set>/best@<k>": Metric("fraction", "problems with at least one right answer among k"),
    "val/<set>/maj@<k>": Metric(
        "fraction", "problems whose most frequent answer among k is right; absent where the reward names none"
    ),
    "val/<set>/response_length": Metric("tokens", "mean response length on a validation set"),
    "val/<set>/truncated_ratio": Metric("fraction", "responses cut at the length limit"),
    "val/<set>/failures": Metric("samples", "samples whose scoring failed; they count as wrong"),
}


def describe(name: str) -> Metric | None:
    """The table's entry for a metric's name (`val/aime/mean@32` finds `val/<set>/mean@<k>`), None when unlisted."""
    return METRICS.get(name) or next((METRICS[key] for key, pattern in _PATTERNS if pattern.fullmatch(name)), None)


def group_metrics(generated: Sequence[Group], kept: Sequence[Group]) -> dict[str, float]:
    """The `reward/…` and `response_length/…` metrics of one rollout step.

    `generated` are all groups of the step, `kept` the ones it trains on. Samples out of the statistics (Sample.scored)
    count only in `reward/failures` and the lengths. A statistic over no sample is NaN.
    """
    samples = _samples(generated)
    return {
        **_reward_metrics(samples),
        "reward/acc_kept": _mean([s.score.acc for s in _scored(_samples(kept))]),
        "reward/groups_one_scored": float(sum(map(_one_scored, kept))),
        **_length_metrics(samples),
    }


def _reward_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    scores = [sample.score for sample in _scored(samples)]
    rewards = np.array([score.reward for score in scores], dtype=np.float64)
    return {
        "reward/mean": _mean(rewards),
        "reward/std": float(rewards.std()) if len(rewards) else math.nan,
        "reward/score_mean": _mean([score.score for score in scores]),
        "reward/overlong_penalty_mean": _mean([score.penalty for score in scores]),
        "reward/acc": _mean([score.acc for score in scores]),
        "reward/failures": float(sum(sample.score.failure is not None for sample in samples)),
        "reward/unparsed_ratio": _mean([score.failure is None and score.pred in _UNPARSED for score in scores]),
    }


def _length_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    lengths = [len(sample.rollout.token_ids) for sample in samples]
    return {
        "response_length/mean": _mean(lengths),
        "response_length/max": float(max(lengths, default=math.nan)),
        "response_length/min": float(min(lengths, default=math.nan)),
        "response_length/truncated_ratio": _mean([sample.rollout.truncated for sample in samples]),
    }


def _one_scored(group: Group) -> bool:
    return len(group.samples) > 1 and len(_scored(group.samples)) == 1


def _samples(groups: Sequence[Group]) -> list[Sample]:
    return [sample for group in groups for sample in group.samples]


def _scored(samples: Sequence[Sample]) -> list[Sample]:
    return [sample for sample in samples if sample.scored]


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(np.asarray(values, dtype=np.float64))) if len(values) else math.nan


def _pattern(name: str) -> re.Pattern[str]:
    """`val/<set>/mean@<k>` as a regular expression; a placeholder stands for one path segment's text."""
    return re.compile(r"[^/@]+".join(re.escape(part) for part in re.split(r"<\w+>", name)))


_PATTERNS = [(name, _pattern(name)) for name in METRICS if "<" in name]
