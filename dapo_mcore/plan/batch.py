"""The arithmetic of a rollout step: prompts → groups → samples → mini-batches → micro-batches per rank, in tokens.

Change here: which lengths a plan imagines. Micro-batches come from batch/packing.py, as a run makes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from statistics import NormalDist

import numpy as np

from dapo_mcore.actor.scatter import packing_options
from dapo_mcore.batch.context import round_up
from dapo_mcore.batch.packing import plan_micro_batches
from dapo_mcore.config.schema import Config
from dapo_mcore.plan.hardware import Assumptions
from dapo_mcore.plan.job import Job

_DEFAULT_MEAN = 0.35
_FILL = 0.96
"""How full packs of an estimate are; packing reaches .92 to .97."""


@dataclass(frozen=True)
class Batch:
    """One rollout step.

    groups_generated   groups that a step generates on average
    kept_ratio         share of them that is trained on
    responses, train_samples   samples generated, and trained on
    samples, updates   samples per mini-batch; mini-batches per rollout step, all epochs together
    micro_batches      per rank and mini-batch
    mean_response, mean_sample   tokens; a sample is a prompt and its response
    tokens, squares    of the mean micro-batch, over its context-parallel ranks: Σ length and Σ length²
    loss_tokens        of the mean micro-batch
    widest             tokens of the fullest micro-batch on one context-parallel rank, which memory must hold
    imbalance          work of the busiest rank over the mean
    """

    groups_generated: float
    kept_ratio: float
    responses: float
    train_samples: int
    samples: int
    updates: int
    micro_batches: int
    mean_response: float
    mean_sample: float
    tokens: float
    squares: float
    loss_tokens: float
    widest: int
    imbalance: float


def batch_of(job: Job, *, exact: bool = True) -> Batch:
    """Return the arithmetic of the job's rollout step, for response lengths at evenly spaced quantiles.

    exact  False estimates the number of micro-batches instead of packing them: in 1 % of the time, for a first choice of many.
    """
    config, assume = job.config, job.assume
    size, sampling = config.rollout.group_size, config.sampling
    ratio = kept_ratio(config, assume)
    groups = sampling.train_batch_prompts / ratio
    num_samples = config.batch.mini_batch_prompts * size
    responses = response_lengths(config, assume, num_samples)
    prompt = mean_prompt(config, assume)
    lengths = responses + prompt
    micro = _packed(job, lengths) if exact else _estimated(job, lengths)
    parts = job.data * micro.count
    return Batch(
        groups_generated=groups,
        kept_ratio=ratio,
        responses=groups * size,
        train_samples=sampling.train_batch_prompts * size,
        samples=num_samples,
        updates=config.updates_per_step,
        micro_batches=micro.count,
        mean_response=float(responses.mean()),
        mean_sample=float(lengths.mean()),
        tokens=float(lengths.sum()) / parts,
        squares=float(np.square(lengths).sum()) / parts,
        loss_tokens=float(responses.sum()) / parts,
        widest=config.batch.max_tokens,
        imbalance=micro.imbalance,
    )


def kept_ratio(config: Config, assume: Assumptions) -> float:
    """Return the share of groups that a step keeps: 1 if nothing is filtered."""
    sampling = config.sampling
    if sampling.style != "filter":
        return 1.0
    return min(1.0, assume.kept_ratio or sampling.train_batch_prompts / sampling.gen_batch_prompts)


def assumed(config: Config, assume: Assumptions) -> Assumptions:
    """Return the figures as this plan uses them: those that are 0 stand for what the configuration implies."""
    return replace(assume, mean_response_tokens=_mean_response(config, assume), kept_ratio=kept_ratio(config, assume))


def _mean_response(config: Config, assume: Assumptions) -> float:
    return assume.mean_response_tokens or _DEFAULT_MEAN * config.rollout.max_response_tokens


def mean_prompt(config: Config, assume: Assumptions) -> int:
    return round(min(assume.mean_prompt_tokens, config.data.max_prompt_tokens))


def response_lengths(config: Config, assume: Assumptions, count: int, limit: int | None = None) -> np.ndarray:
    """Return `count` response lengths, float64 and ascending: a log-normal distribution, cut at `limit` (None: training's).

    They are its quantiles in the middle of `count` equal parts, so two plans never differ by chance.
    """
    limit = limit or config.rollout.max_response_tokens
    median = _mean_response(config, assume) * math.exp(-(assume.response_spread**2) / 2)
    return np.clip(np.round(median * np.exp(assume.response_spread * _normal_quantiles(count))), 1, limit)


@cache
def _normal_quantiles(count: int) -> np.ndarray:
    normal = NormalDist()
    return np.array([normal.inv_cdf((number + 0.5) / count) for number in range(count)])


@dataclass(frozen=True)
class _MicroBatches:
    """Micro-batches per rank, and the work of the busiest rank over the mean."""

    count: int
    imbalance: float


def _estimated(job: Job, lengths: np.ndarray) -> _MicroBatches:
    """Return about as many as packing makes: no two samples above half of the budget share one."""
    budget = job.config.batch.max_tokens * job.context
    full = math.ceil(lengths.sum() / (_FILL * budget * job.data))
    least = max(1, full, math.ceil((lengths > budget / 2).sum() / job.data))
    return _MicroBatches(round_up(least, job.config.parallel.micro_batch_multiple), 1.0)


def _packed(job: Job, lengths: np.ndarray) -> _MicroBatches:
    options = packing_options(job.config)
    return _plan(tuple(lengths.tolist()), data_parallel=job.data, context_parallel=job.context, **options)


@cache
def _plan(lengths: tuple[float, ...], **how: int) -> _MicroBatches:
    tokens = np.array(lengths, dtype=np.int64)
    plan = plan_micro_batches(tokens, **how)
    per_rank = [tokens[[sample for part in rank for sample in part]].sum() for rank in plan]
    return _MicroBatches(len(plan[0]), float(max(per_rank) / max(1.0, np.mean(per_rank))))
