"""Settings that a user has changed but that have no effect in this configuration, and why.

Change here: a setting that another one makes meaningless, as a line of IDLE. Where such a pair can only be a mistake about the
objective, a rule of rules.py refuses it instead. Only values that differ from their defaults are named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from dapo_mcore.config.data import EvalSampling
from dapo_mcore.config.reward import RewardConfig
from dapo_mcore.config.settings import Settings
from dapo_mcore.config.values import Section

_GPUS_OF_A_NODE = 8


class Idle(NamedTuple):
    """Keys of one section that have no effect while `holds`, and the words for that; no keys: the whole section."""

    section: str
    keys: tuple[str, ...]
    why: str
    holds: Callable[[Settings], Any]


def _filters(c: Settings) -> bool:
    return c.sampling.style == "filter"


def _serves(c: Settings) -> bool:
    return c.rollout.engine == "sglang"


def _never_carries(c: Settings) -> bool:
    """With style none a step begins as many groups as it trains on, so only on_full keep or abort leave some for later."""
    return c.sampling.style == "none" and c.sampling.on_full == "wait"


def _uses_ray(c: Settings) -> bool:
    servers = _serves(c) and c.rollout.sglang.placement == "ray"
    return servers or c.reward.placement == "ray" or any(tool.placement == "ray" for tool in c.tools)


def _rewards(c: Settings) -> list[RewardConfig]:
    """Return the section `reward` as training and each evaluation set use it."""
    return [c.reward, *map(c.set_reward, c.set_functions)]


def _imports_reward(c: Settings) -> bool:
    return any(":" in function for reward in _rewards(c) for function in reward.functions)


def _has_workers(c: Settings) -> bool:
    return any(reward.num_workers for reward in _rewards(c))


_OF_DRAWING = ("top_p", "top_k")
_OF_OWN_SERVERS = ("placement", "python", "first_gpu", "base_port", "host", "server_args", "restart_budget")
IDLE = (
    Idle("rollout.sglang", (), "rollout.engine is embedded", lambda c: not _serves(c)),
    Idle("rollout", ("max_batch", "num_threads"), "rollout.engine is sglang", _serves),
    Idle(
        "rollout.sglang",
        _OF_OWN_SERVERS,
        "the servers at urls run already",
        lambda c: _serves(c) and c.rollout.sglang.urls,
    ),
    Idle(
        "rollout.sglang",
        ("key_file",),
        "servers that the run starts get keys of their own",
        lambda c: not c.rollout.sglang.urls,
    ),
    Idle("rollout.sglang", ("sync_dir",), "sync is not disk", lambda c: c.rollout.sglang.sync != "disk"),
    Idle(
        "rollout.sglang",
        ("sync_host", "servers_per_group", "senders"),
        "sync is not distributed",
        lambda c: c.rollout.sglang.sync != "distributed",
    ),
    Idle("ray", (), "nothing has placement ray", lambda c: not _uses_ray(c)),
    Idle("sampling", ("gen_batch_prompts",), "sampling.style is not filter", lambda c: not _filters(c)),
    Idle(
        "sampling",
        ("resample_size", "max_samples_per_prompt"),
        "sampling.style is not resample",
        lambda c: c.sampling.style != "resample",
    ),
    Idle(
        "sampling",
        ("on_exhausted", "max_gen_batches"),
        "sampling.style none keeps every group",
        lambda c: c.sampling.style == "none",
    ),
    Idle("sampling", ("carry_surplus",), "sampling.style none has no surplus", _never_carries),
    Idle(
        "sampling",
        ("max_staleness",),
        "no group is left for a later step",
        lambda c: _never_carries(c) or not c.sampling.carry_surplus,
    ),
    Idle("agent", (), "there are no tools", lambda c: not c.tools),
    Idle(
        "agent",
        ("declare_tools",),
        "call_format code_block declares none",
        lambda c: c.agent.call_format == "code_block",
    ),
    Idle(
        "reward.overlong",
        ("max_length", "cache", "factor", "count_tool_output"),
        "reward.overlong.penalty is false",
        lambda c: not c.reward.overlong.penalty,
    ),
    Idle("reward.overlong", ("count_tool_output",), "there are no tools", lambda c: not c.tools),
    Idle("reward", ("failure_value",), "reward.on_failure is mask", lambda c: c.reward.on_failure == "mask"),
    Idle("reward", ("timeout_seconds", "placement"), "there are no reward.workers", lambda c: not _has_workers(c)),
    Idle("reward", ("adapter",), "no reward function is imported", lambda c: not _imports_reward(c)),
    Idle("algo.kl", ("estimator", "place"), "algo.kl.coef is 0", lambda c: not c.algo.kl.coef),
    Idle("algo.tis", ("lower", "cap"), "algo.tis.mode is off", lambda c: c.algo.tis.mode == "off"),
    Idle("algo", ("rejection_divisor",), "algo.rejection is empty", lambda c: not c.algo.rejection),
    Idle(
        "algo",
        ("loss_length",),
        "algo.loss_mode is not seq-mean-token-sum-norm",
        lambda c: c.algo.loss_mode != "seq-mean-token-sum-norm",
    ),
    Idle(
        "algo",
        ("clip_low", "clip_high"),
        "algo.policy_loss kl_cov does not clip",
        lambda c: c.algo.policy_loss == "kl_cov",
    ),
    Idle(
        "algo",
        ("advantage_eps",),
        "nothing is divided by a standard deviation",
        lambda c: c.algo.advantage_std == "none",
    ),
    *(
        Idle(f"{parent}optimizer", ("min_lr", "decay_updates"), "its schedule is constant", is_constant)
        for parent, is_constant in (
            ("", lambda c: c.optimizer.schedule == "constant"),
            ("critic.", lambda c: c.critic.optimizer.schedule == "constant"),
        )
    ),
    Idle("optimizer", ("spike_window",), "optimizer.spike_factor is null", lambda c: c.optimizer.spike_factor is None),
    Idle(
        "critic.optimizer",
        ("spike_window",),
        "its spike_factor is null",
        lambda c: c.critic.optimizer.spike_factor is None,
    ),
    Idle(
        "checkpoint",
        ("keep", "keep_best", "best_metric"),
        "nothing is saved",
        lambda c: c.checkpoint.every is None and not c.checkpoint.at_end,
    ),
    Idle("checkpoint", ("best_mode",), "checkpoint.keep_best is 0", lambda c: not c.checkpoint.keep_best),
    Idle("eval", (), "eval.sets is empty", lambda c: not c.eval.sets),
    Idle("observe", ("eval_samples_per_set",), "eval.sets is empty", lambda c: not c.eval.sets),
    Idle(
        "warm_start", ("stop_at",), "warm_start.choose is null", lambda c: c.warm_start and c.warm_start.choose is None
    ),
)


def without_effect(config: Settings) -> list[str]:
    """Return a line for each reason: `no effect: algo.kl.estimator k1 (algo.kl.coef is 0)`."""
    told: set[str] = set()
    lines = []
    for idle in IDLE:
        if not idle.holds(config):
            continue
        changed = {key: value for key, value in _changed(config, idle.section, idle.keys) if key not in told}
        told |= changed.keys()
        if changed:
            lines.append(_no_effect(changed, idle.why))
    return lines + _of_evaluation(config)


def _of_evaluation(c: Settings) -> list[str]:
    """Return lines about evaluation sets, and about settings of `eval` that none of them takes."""
    sets = c.eval.sets
    if not sets:
        return []
    changed = dict(_changed(c, "eval", tuple(EvalSampling.__dataclass_fields__)))
    untaken = {key: value for key, value in changed.items() if not _takers(c, key.removeprefix("eval."))}
    greedy = [name for name in sets if not c.eval.of(name).temperature]
    cuts = {f"eval.sets.{name}.{key}": getattr(sets[name], key) for name in greedy for key in _OF_DRAWING}
    cuts |= {f"eval.{key}": changed.get(f"eval.{key}") for key in _OF_DRAWING if {*_takers(c, key)} <= {*greedy}}
    unordered = {f"eval.sets.{name}.shuffle": False for name, section in sets.items() if not section.shuffle}
    told = {
        "every set has its own": untaken,
        "temperature 0 is greedy": {
            key: value for key, value in cuts.items() if value is not None and key not in untaken
        },
        "evaluation takes all prompts in the order of the file": unordered,
    }
    return [_no_effect(idle, why) for why, idle in told.items() if idle]


def _takers(c: Settings, key: str) -> list[str]:
    """Return the evaluation sets that take a setting of `eval`, for they have none of their own."""
    return [name for name, section in c.eval.sets.items() if getattr(section, key) is None]


def doubtful(config: Settings) -> list[str]:
    """Return a line for each setting that is allowed but hardly what people mean."""
    return [f"warning: {line}" for line in (*_wide_servers(config), *_seldom_judged(config), *_long_warmups(config))]


def _wide_servers(c: Settings) -> Iterator[str]:
    sglang = c.rollout.sglang
    if _serves(c) and not sglang.urls and sglang.tensor_parallel > _GPUS_OF_A_NODE and sglang.device != "cpu":
        yield (
            f"rollout.sglang.tensor_parallel {sglang.tensor_parallel}: a server runs on one node, and most nodes have "
            f"{_GPUS_OF_A_NODE} GPUs; use at most as many, and more servers"
        )


def _seldom_judged(c: Settings) -> Iterator[str]:
    """Checkpoints count among the best only where they are evaluated."""
    metric, saved, judged = c.checkpoint.best_metric or "", c.checkpoint.every, c.eval.every
    if metric.startswith("val/") and saved and judged is None:
        yield (
            f"checkpoint.best_metric {metric} is known after the last rollout step alone (eval.every is null): only the last checkpoint "
            "can be the best; set eval.every, so that it divides checkpoint.every"
        )
    elif metric.startswith("val/") and saved and saved % judged:
        yield (
            f"checkpoint.best_metric {metric} is known every {judged} rollout steps (eval.every), and checkpoint.every is {saved}: "
            f"only the last checkpoint and those of each {math.lcm(saved, judged)} steps can be the best; let eval.every divide "
            "checkpoint.every"
        )


def _long_warmups(c: Settings) -> Iterator[str]:
    """The learning rate of a run that ends in its warm-up never reaches lr."""
    optimizers = {"optimizer": c.optimizer} | (
        {"critic.optimizer": c.critic.optimizer} if c.algo.advantage == "gae" else {}
    )
    for key, optimizer in optimizers.items():
        steps = (optimizer.warmup_updates or 0) / c.updates_per_step
        if (
            c.num_rollout_steps is not None
            and "warmup_updates" in optimizer.model_fields_set
            and steps > c.num_rollout_steps
        ):
            yield (
                f"the warm-up of {key} lasts {steps:,.4g} rollout steps, and the run has {c.num_rollout_steps:,}: its learning rate never "
                f"reaches {optimizer.lr:g}; shorten it, or train longer"
            )


def _changed(config: Settings, path: str, keys: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of a section whose values are not the defaults, with their values."""
    section: Any = config
    for part in path.split("."):
        section = getattr(section, part)
    if section is None:
        return
    for key in keys or type(section).model_fields:
        value, field = getattr(section, key), type(section).model_fields[key]
        if value == field.get_default(call_default_factory=True):
            continue
        if isinstance(value, Section):
            yield from _changed(config, f"{path}.{key}", ())
        else:
            yield f"{path}.{key}", value


def _no_effect(changed: Mapping[str, Any], why: str) -> str:
    return f"no effect: {', '.join(f'{key} {_shown(value)}' for key, value in changed.items())} ({why})"


def _shown(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)
