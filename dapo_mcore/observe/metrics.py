"""The table of every metric that a run writes, and the metrics that are computed from groups.

Change here: a metric's name, unit and meaning (METRICS; sinks, live view and plots use its names), and the statistics of
rewards and response lengths. A renamed metric keeps its old name in OLD_NAMES. README.md lists the names of verl and slime.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:  # types imports torch, which reading or plotting metrics does not need
    from dapo_mcore.types import Group, Sample


class Metric(NamedTuple):
    """The unit of a metric (empty if it has none) and what it measures over one rollout step."""

    unit: str
    meaning: str


METRICS: dict[str, Metric] = {
    "reward/mean": Metric("", "score plus overlong penalty, mean over the generated samples that were scored"),
    "reward/std": Metric("", "population standard deviation of the reward over the same samples"),
    "reward/score_mean": Metric("", "score of the answer without the penalty, mean over the same samples"),
    "reward/overlong_penalty_mean": Metric("", "soft overlong penalty (0 or negative), mean over the same samples"),
    "reward/acc": Metric("fraction", "mean correctness (types.Score.acc) of generated samples that were scored"),
    "reward/acc_kept": Metric("fraction", "the same of the scored samples of kept groups"),
    "reward/failures": Metric(
        "samples",
        "generated samples whose scoring failed (timeout, exception, NaN), masked or not, and those that lost a tool or whose "
        "log-probs from the engine are not finite, always masked",
    ),
    "reward/groups_one_scored": Metric(
        "groups", "trained groups with several samples but one score: without a baseline that sample has advantage 0"
    ),
    "reward/unparsed_ratio": Metric("fraction", "scored samples in which the reward function found no answer"),
    "reward/void_ratio": Metric(
        "fraction",
        "scored samples without a token of the policy, and wrong ones without an answer; absent if the reward function names none",
    ),
    "response_length/mean": Metric("tokens", "response length of generated samples, with tool output, mean"),
    "response_length/max": Metric("tokens", "longest response"),
    "response_length/min": Metric("tokens", "shortest response"),
    "response_length/policy_mean": Metric(
        "tokens", "the same without tool output, mean; absent, as the next, if no response has any"
    ),
    "response_length/policy_max": Metric("tokens", "the same, maximum"),
    "response_length/clip_ratio": Metric(
        "fraction", "responses truncated at rollout.max_response_tokens or, with tools, agent.max_turns"
    ),
    "turns/mean": Metric("turns", "turns that the policy wrote in a response, mean over generated samples"),
    "turns/max": Metric("turns", "the same, maximum"),
    "tools/calls": Metric(
        "calls", "tool calls in the generated samples; absent without tools, as all of turns and tools"
    ),
    "tools/errors": Metric("calls", "those that the policy got wrong: unreadable, unknown tool, code that fails"),
    "tools/timeouts": Metric("calls", "those that took longer than the tool's timeout_s"),
    "tools/lost": Metric("calls", "those that failed through no fault of the policy; their samples are not trained on"),
    "tools/call_s": Metric("s", "time of a call, mean"),
    "tools/tokens": Metric("tokens", "tokens of a generated sample that tools gave, mean"),
    "sampling/groups_generated": Metric("groups", "groups finished in this step"),
    "sampling/groups_kept": Metric("groups", "groups trained on"),
    "sampling/groups_all_right": Metric("groups", "groups in which every answer is right: they give no gradient"),
    "sampling/groups_all_wrong": Metric("groups", "groups in which every answer is wrong: they give no gradient"),
    "sampling/kept_ratio": Metric("fraction", "groups with right and wrong answers, among the groups generated"),
    "sampling/gen_batches": Metric(
        "batches", "generation batches; with continuous generation, groups begun / gen_batch_prompts"
    ),
    "sampling/generated_tokens": Metric("tokens", "response tokens generated in this step, without tool output"),
    "sampling/surplus_reused": Metric("groups", "trained groups that an earlier step generated"),
    "sampling/surplus_carried": Metric(
        "groups", "surplus groups with right and wrong answers, carried to the next step"
    ),
    "sampling/surplus_dropped": Metric(
        "groups", "carried groups that became too stale, and surplus groups that were not carried"
    ),
    "sampling/groups_stale": Metric(
        "groups", "groups dropped because their weights were older than sampling.max_staleness allows"
    ),
    "sampling/groups_aborted": Metric(
        "groups", "groups that sampling.on_full abort ended unfinished; their prompts are generated again later"
    ),
    "sampling/groups_pending": Metric(
        "groups", "groups in flight at the end of the step; sampling.on_full keep finishes them in the next step"
    ),
    "sampling/in_flight_mean": Metric("groups", "groups in flight on the servers, mean over the generation time"),
    "sampling/in_flight_max": Metric("groups", "groups in flight on the servers, maximum"),
    "sampling/surplus_wait_s": Metric("s", "time spent waiting for groups in flight after the batch was full"),
    "sampling/staleness_mean": Metric(
        "versions", "weight versions between a trained group's oldest token and the policy that trains on it, mean"
    ),
    "sampling/staleness_max": Metric("versions", "the same, maximum over trained groups"),
    "sampling/token_staleness_mean": Metric("versions", "the same for each token that the policy wrote, mean"),
    "sampling/samples_resumed": Metric("samples", "trained responses that several weight versions generated"),
    "sampling/resample_rate": Metric(
        "fraction", "responses added to groups whose answers did not vary, among all responses generated"
    ),
    "sampling/samples_generated": Metric("samples", "responses generated in this step"),
    "actor/loss": Metric(
        "",
        "loss as optimised (policy term, KL and entropy bonus, not model.moe_aux_loss_coef), mean over the step's updates",
    ),
    "actor/skipped_updates": Metric(
        "updates",
        "gradient steps skipped because a loss, log-prob, gradient or other number was not finite on some rank",
    ),
    "actor/skipped_spikes": Metric("updates", "gradient steps skipped by optimizer.spike_factor"),
    "actor/nll": Metric("nats", "negative log-prob of the loss tokens, mean"),
    "actor/entropy": Metric("nats", "entropy of the policy, mean over loss tokens"),
    "actor/grad_norm": Metric("", "gradient norm before clipping, mean over the step's updates"),
    "actor/lr": Metric("", "learning rate of the step's last update"),
    "actor/clip_low": Metric("fraction", "loss tokens whose gradient the lower clip removed"),
    "actor/clip_high": Metric("fraction", "loss tokens whose gradient the upper clip removed"),
    "actor/clip_dual": Metric("fraction", "loss tokens whose loss the dual clip capped"),
    "actor/ppo_kl": Metric("nats", "old minus new log-prob, mean over loss tokens; may be negative"),
    "actor/ratio_max_deviation": Metric("", "largest |ratio - 1| of the step"),
    "actor/first_update_ratio_deviation": Metric(
        "", "largest |ratio - 1| of the first update; 0 with algo.old_logprobs actor"
    ),
    "actor/entropy_coef": Metric("", "coefficient of the entropy bonus that algo.adaptive_entropy gave the step"),
    "actor/covariance": Metric(
        "nats", "covariance of log-prob and advantage over a mini-batch's loss tokens, mean over the step's updates"
    ),
    "actor/covariance_selected": Metric(
        "fraction", "loss tokens that kl_cov or clip_cov has chosen, mean over updates"
    ),
    "actor/moe_aux_loss": Metric(
        "", "load-balancing loss without its coefficient, mean over layers with experts and samples; 1 for equal loads"
    ),
    "actor/ref_kl": Metric(
        "nats", "reference KL: KL(policy ‖ reference policy) by algo.kl.estimator, mean over loss tokens"
    ),
    "critic/vf_loss": Metric("", "value loss, mean over the step's updates"),
    "critic/vpred_mean": Metric("", "the critic's value, mean over loss tokens"),
    "critic/returns/mean": Metric("", "what the critic learns (advantage + value), mean over loss tokens"),
    "critic/explained_variance": Metric(
        "fraction", "1 - mean squared error / variance of the returns: 1 is perfect, 0 a constant"
    ),
    "critic/vf_clipfrac": Metric(
        "fraction", "loss tokens without a gradient, since critic.clip keeps their value near the old one"
    ),
    "critic/grad_norm": Metric("", "gradient norm of the critic before clipping, mean over the step's updates"),
    "critic/lr": Metric("", "learning rate of the critic's last update"),
    "critic/skipped_updates": Metric("updates", "gradient steps of the critic that were skipped"),
    "mismatch/logprob_diff_mean": Metric("nats", "|actor's log-prob - rollout engine's|, mean over loss tokens"),
    "mismatch/logprob_diff_p99": Metric("nats", "the same, 99th percentile, from a histogram: at most 6 % too high"),
    "mismatch/logprob_diff_max": Metric("nats", "the same, maximum"),
    "mismatch/k3_kl": Metric("nats", "k3 estimate of KL(rollout engine ‖ actor) over loss tokens"),
    "mismatch/from_<size>": Metric("fraction", "loss tokens whose |difference| is between this size and ten times it"),
    "tis/weight_mean_before": Metric(
        "", "importance weight exp(actor's log-prob - engine's) before algo.tis limits it, mean over loss tokens"
    ),
    "tis/weight_mean_after": Metric(
        "", "the weight after algo.tis, which multiplies a token's loss, mean over loss tokens"
    ),
    "tis/truncated_ratio": Metric("fraction", "loss tokens whose weight a bound of algo.tis changed, or made 0"),
    "tis/effective_sample_size": Metric(
        "fraction", "(Σw)² / (N·Σw²) of the weights after algo.tis over N loss tokens: 1 if all are equal"
    ),
    "tis/norm_factor": Metric("", "mean weight by which algo.tis.normalize has divided the weights"),
    "rejection/tokens": Metric("fraction", "loss tokens that algo.rejection keeps out of training"),
    "rejection/responses": Metric("fraction", "responses all of whose loss tokens are rejected"),
    "rollout/servers_serving": Metric("servers", "rollout servers that have the current weights and take requests"),
    "rollout/retries": Metric("requests", "attempts to generate a sample after its first"),
    "rollout/dropped_aborted": Metric(
        "responses", "partial responses of aborted requests, dropped and generated again"
    ),
    "rollout/dropped_stale_version": Metric("responses", "responses of older weights than allowed, dropped"),
    "rollout/dropped_mixed_versions": Metric("responses", "responses during which the weights changed, dropped"),
    "rollout/dropped_unknown_version": Metric("responses", "responses of weights that this run did not send, dropped"),
    "rollout/tokens_cut": Metric(
        "tokens", "tokens that the policy wrote after the end of a call, dropped; with tools only"
    ),
    "rollout/dropped_malformed": Metric("responses", "responses without usable tokens or log-probs, dropped"),
    "rollout/servers_suspected": Metric("times", "servers taken out because a request or a health check failed"),
    "rollout/servers_excluded": Metric("times", "servers taken out because a weight update failed on them"),
    "rollout/servers_resynced": Metric("times", "servers that got the current weights before they served again"),
    "rollout/server_restarts": Metric("times", "servers started again"),
    "sync/write_s": Metric("s", "gathering the weights and writing them to rollout.sglang.sync_dir"),
    "sync/load_s": Metric("s", "servers loading the weights from rollout.sglang.sync_dir"),
    "sync/broadcast_s": Metric("s", "gathering the weights and broadcasting them to the servers"),
    "sync/tensor_s": Metric("s", "gathering the weights, and servers copying them from rank 0's memory"),
    "sync/bytes": Metric("bytes", "weights sent to each server; with rollout.sglang.delta all weights, changed or not"),
    "sync/delta_bytes": Metric("bytes", "what each server got of them as changes; absent if all weights were sent"),
    "sync/changed_share": Metric("fraction", "of values that have changed since the last sync; absent as delta_bytes"),
    "sync/snapshot_bytes": Metric("bytes", "host memory of rank 0 for the weights that changes are counted from"),
    "sync/repeats": Metric("times", "syncs repeated because a server died during the broadcast"),
    "sync/weights_lost": Metric(
        "times", "extra syncs during generation, because all servers had died and restarted without weights"
    ),
    "sync/servers_verified": Metric("servers", "servers whose weight checksums were compared with another server's"),
    "sync/gb_per_s": Metric("GB/s", "sync/bytes / time of the whole sync"),
    "sync/release_s": Metric("s", "colocated: servers releasing their memory, part of sync/handover_s"),
    "sync/resume_s": Metric("s", "colocated: servers allocating it again, part of sync/handover_s"),
    "sync/handover_s": Metric(
        "s", "colocated: trainer and servers releasing and allocating memory, without the sync itself"
    ),
    "perf/tokens_per_s": Metric("tokens/s", "trained tokens (prompt and response) / time/step_s, over all GPUs"),
    "perf/tokens_per_s_per_gpu": Metric("tokens/s", "the same for each training process, of which a GPU has one"),
    "perf/tflops_per_gpu": Metric(
        "TFLOP/s",
        "model FLOPs of the gradient steps of policy and critic (architecture/flops.py) / time/train_s, for each training process",
    ),
    "perf/mfu/actor": Metric(
        "fraction",
        "perf/tflops_per_gpu / the card's dense bf16 peak, also with FP8; absent on a CPU and an unknown card",
    ),
    "perf/generated_tokens_per_s": Metric("tokens/s", "sampling/generated_tokens / time/generate_s"),
    "memory/rss_gib": Metric("GiB", "resident memory of the controller process"),
    "memory/weights_gib": Metric(
        "GiB", "parameters and buffers of policy and critic, the largest rank's as in all that follow"
    ),
    "memory/reference_gib": Metric("GiB", "the same of the reference policy; absent without one"),
    "memory/gradients_gib": Metric("GiB", "gradient buffers"),
    "memory/optimizer_gib": Metric("GiB", "Adam's moments and, for bf16 weights, their fp32 copies, on the device"),
    "memory/optimizer_host_gib": Metric("GiB", "the part of them on the host; absent if there is none"),
    "memory/head_gib": Metric(
        "GiB", "fp32 logits of one chunk (batch.head_chunk_tokens), which the policy head holds while it runs"
    ),
    "memory/score_peak_gib": Metric(
        "GiB", "peak of allocated GPU memory in scoring; absent on a CPU, as the next three"
    ),
    "memory/score_activations_gib": Metric(
        "GiB", "that peak above what was allocated before: activations, memory/head_gib, temporary tensors"
    ),
    "memory/update_peak_gib": Metric("GiB", "peak of allocated GPU memory in the gradient steps"),
    "memory/update_activations_gib": Metric(
        "GiB", "that peak above what was allocated before; in a run's first step also Adam's moments"
    ),
    "updates": Metric("updates", "gradient steps since the start of the run"),
    "updates_per_step": Metric("updates", "gradient steps of this rollout step"),
    "time/step_s": Metric(
        "s",
        "wall time of the whole rollout step, without start, evaluation and saving",
    ),
    "time/<phase>_s": Metric(
        "s",
        "wall time of generate, reward, filter, logprob, train, record, wait or sync; with servers, reward is the time in which only "
        "scores are waited for; with rollout.async_steps, generate and reward run during the step before, and wait is the rest "
        "of them",
    ),
    "time/start_s": Metric(
        "s",
        "before the first step, in the run's first row: servers, weights, warm start, first sync, loading a checkpoint",
    ),
    "time/eval_s": Metric("s", "evaluation after the rollout step"),
    "time/save_s": Metric("s", "writing the checkpoint or export of the previous step"),
    "val/<set>/mean@<k>": Metric("fraction", "accuracy on a validation set, mean over k samples per problem"),
    "val/<set>/<source>/mean@<k>": Metric(
        "fraction", "the same on the rows of one data source, in a set that mixes several"
    ),
    "val/<set>/best@<k>": Metric("fraction", "problems with at least one right answer among k samples"),
    "val/<set>/maj@<k>": Metric(
        "fraction",
        "problems whose most frequent answer among k samples is right; absent if the reward function names no answer",
    ),
    "val/<set>/response_length": Metric("tokens", "mean response length on a validation set, with tool output"),
    "val/<set>/policy_length": Metric("tokens", "the same without tool output; absent if no response has any"),
    "val/<set>/clip_ratio": Metric("fraction", "responses truncated, as response_length/clip_ratio"),
    "val/<set>/failures": Metric("samples", "samples that have no score, as in reward/failures; they count as wrong"),
    "val/<set>/turns": Metric("turns", "turns that the policy wrote in a response, mean; absent without tools"),
    "val/<set>/tool_calls": Metric("calls", "tool calls of a response, mean; absent without tools"),
}


OLD_NAMES = {
    "response_length/truncated_ratio": "response_length/clip_ratio",
    "val/<set>/truncated_ratio": "val/<set>/clip_ratio",
}
"""Names in the files of older versions, and today's."""


def describe(name: str) -> Metric | None:
    """Return the table's entry for a metric (`val/aime/mean@32` finds `val/<set>/mean@<k>`), None if it is not listed."""
    return METRICS.get(name) or next((METRICS[key] for key, pattern in _PATTERNS if pattern.fullmatch(name)), None)


@cache
def current_name(name: str) -> str:
    """Return today's name of a metric that an older version may have written."""
    for old, new in OLD_NAMES.items():
        if match := _pattern(old).fullmatch(name):
            return re.sub(r"<\w+>", lambda _: match[1], new)
    return name


def group_metrics(generated: Sequence[Group], kept: Sequence[Group]) -> dict[str, float]:
    """Return the `reward/…` and `response_length/…` metrics of one rollout step.

    generated  all groups of the step.
    kept       the groups that the step trains on.
    Samples that are not scored (Sample.scored) count only in `reward/failures` and the lengths. A statistic over no sample
    is NaN.
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
    void = [sample.void for sample in _scored(samples)] if any(score.pred for score in scores) else []
    return {
        "reward/mean": _mean(rewards),
        "reward/std": float(rewards.std()) if len(rewards) else math.nan,
        "reward/score_mean": _mean([score.score for score in scores]),
        "reward/overlong_penalty_mean": _mean([score.penalty for score in scores]),
        "reward/acc": _mean([score.acc for score in scores]),
        "reward/failures": float(sum(sample.score.failure is not None for sample in samples)),
        "reward/unparsed_ratio": _mean([not score.answered for score in scores]),
        **({"reward/void_ratio": _mean(void)} if void else {}),
    }


def _length_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    lengths = [len(sample.rollout.token_ids) for sample in samples]
    own = [sample.rollout.num_policy_tokens for sample in samples]
    return {
        "response_length/mean": _mean(lengths),
        "response_length/max": float(max(lengths, default=math.nan)),
        "response_length/min": float(min(lengths, default=math.nan)),
        "response_length/clip_ratio": _mean([sample.rollout.truncated for sample in samples]),
        **(
            {"response_length/policy_mean": _mean(own), "response_length/policy_max": float(max(own))}
            if own != lengths
            else {}
        ),
    }


def tool_metrics(generated: Sequence[Group]) -> dict[str, float]:
    """Return the `turns/…` and `tools/…` metrics of one rollout step, over all its samples. A mean over nothing is NaN."""
    rollouts = [sample.rollout for sample in _samples(generated)]
    turns = [rollout.num_turns for rollout in rollouts]
    calls = [call for rollout in rollouts for call in rollout.calls]
    kinds = Counter(call.kind for call in calls)
    return {
        "turns/mean": _mean(turns),
        "turns/max": float(max(turns, default=math.nan)),
        "tools/calls": float(len(calls)),
        "tools/errors": float(kinds["error"]),
        "tools/timeouts": float(kinds["timeout"]),
        "tools/lost": float(kinds["infrastructure"]),
        "tools/call_s": _mean([call.seconds for call in calls]),
        "tools/tokens": _mean([len(rollout.token_ids) - rollout.num_policy_tokens for rollout in rollouts]),
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
    """Return `val/<set>/mean@<k>` as a regular expression. A placeholder is a group that matches part of one segment."""
    return re.compile(r"([^/@]+)".join(re.escape(part) for part in re.split(r"<\w+>", name)))


_PATTERNS = [(name, _pattern(name)) for name in METRICS if "<" in name]
