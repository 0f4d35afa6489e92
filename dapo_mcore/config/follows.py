"""What follows from a configuration's numbers, in the units that people think in.

Change here: a quantity that `dapo-mcore config` and a run print beside the settings.
"""

from __future__ import annotations

from collections.abc import Mapping

from dapo_mcore.config.optimizer import OptimizerConfig
from dapo_mcore.config.settings import Settings


def describe_units(c: Settings) -> list[str]:
    """Return lines about a gradient step, the learning rate's schedule and the servers."""
    prompts, size = c.batch.mini_batch_prompts, c.rollout.group_size
    lines = [
        f"an update trains on {prompts:,} prompts × {size} = {prompts * size:,} samples of at most {c.longest_sequence:,} tokens, "
        f"prompt included: up to {prompts * size * c.longest_sequence:,} tokens",
        f"learning rate: {_schedule(c.optimizer, c.updates_per_step)}",
    ]
    if c.algo.advantage == "gae":
        lines.append(f"learning rate of the critic: {_schedule(c.critic.optimizer, c.updates_per_step)}")
    if c.num_rollout_steps is not None:  # else the data say how many there are (rollout/sampling/length.py)
        lines += describe_decay(c, c.num_rollout_steps)
    servers = c.rollout.sglang
    if c.rollout.engine == "sglang" and servers.urls:
        lines.append(f"servers: {servers.num_servers}, which run already")
    elif c.rollout.engine == "sglang":
        shared = ", shared with the trainer" if servers.colocated else ""
        lines.append(
            f"servers: {servers.num_servers} × tensor_parallel {servers.tensor_parallel} = {servers.num_gpus} "
            f"{'processes' if servers.device == 'cpu' else 'GPUs'}{shared}"
        )
    return lines


def describe_decay(c: Settings, num_steps: int, is_exact: bool = True) -> list[str]:
    """Return lines that say where each cosine ends in a run of `num_steps` rollout steps, or at most so many."""
    optimizers = {"": c.optimizer} | ({" of the critic": c.critic.optimizer} if c.algo.advantage == "gae" else {})
    of = f"{'' if is_exact else 'at most '}{num_steps:,} rollout steps"
    lines = []
    for whose, optimizer in optimizers.items():
        if optimizer.schedule == "constant" or optimizer.decay_updates is None:
            continue
        steps = optimizer.decay_updates / c.updates_per_step
        ends = f"the cosine{whose} ends after {steps:,.4g} of {of}"
        if steps > num_steps:
            ends = f"the cosine{whose} of {steps:,.4g} rollout steps is longer than the run of {of}, which ends above min_lr"
        lines.append(ends)
    return lines


def describe_evaluation(c: Settings, num_prompts: Mapping[str, int], most: int | None = None) -> list[str]:
    """Return a line about the samples of one evaluation, for the number of prompts of each set. A set of `most` prompts may have
    more of them."""
    if not c.eval.sets:
        return []
    parts, total, is_cut = [], 0, False
    for name, count in num_prompts.items():
        samples, is_cut = c.eval.of(name).samples_per_prompt, is_cut or count == most
        parts.append(
            f"{name} {'at least ' if count == most else ''}{count:,} prompts × {samples} = {count * samples:,}"
        )
        total += count * samples
    times = [f"every {c.eval.every} rollout steps"] if c.eval.every else []
    times += [*(["before the first step"] if c.eval.at_start else []), "after the last"]
    return [
        f"evaluation {', '.join(times[:-1])}{' and ' if times[:-1] else ''}{times[-1]}: {'; '.join(parts)}; together "
        f"{'at least ' if is_cut else ''}{total:,} samples"
    ]


def _schedule(optimizer: OptimizerConfig, updates: int) -> str:
    warmup = f"warm-up of {_both(optimizer.warmup_updates or 0, updates)}"
    if optimizer.schedule == "constant" or optimizer.decay_updates is None:
        return f"{optimizer.lr:g} after a {warmup}"
    return f"{optimizer.lr:g} after a {warmup}, at {optimizer.min_lr:g} after {_both(optimizer.decay_updates, updates)}"


def _both(num_updates: int, per_step: int) -> str:
    """Return the length in both units: `160 updates (10 rollout steps)`."""
    return f"{num_updates:,} updates ({num_updates / per_step:,.4g} rollout steps)"
