"""Rules of verl's table about the engine's mismatch: importance weights, rejection, and old log-probs of the engine.

Change here: how algorithm.rollout_correction becomes algo.tis, algo.rejection and algo.old_logprobs. Source at verl b178a3c:
verl/trainer/ppo/rollout_corr_helper.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dapo_mcore.foreign.table import Outcome, Source, became, gone

_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
_CORRECTION = "algorithm.rollout_correction"
_LOG_PROBS = f"{_ROLLOUT}.calculate_log_probs"
SETTINGS = tuple(
    f"{_CORRECTION}.{name}"
    for name in ("rollout_is", "rollout_is_threshold", "rollout_is_batch_normalize", "rollout_rs", "rollout_rs_threshold",
                 "rollout_rs_threshold_lower", "rollout_token_veto_threshold", "bypass_mode", "loss_type",
                 "use_policy_gradient", "_target_")
)  # fmt: skip
"""All settings of the section, with those of older versions."""
LOSS_NAMES = (f"{_ACTOR}.policy_loss.loss_mode", f"{_ACTOR}.loss_mode")
"""The setting of the policy loss under both of its names."""
_LEVELS = {"token": "token", "seq_sum": "sequence", "seq_mean": "geometric", "seq_max": "every"}
"""Levels of verl's rollout_rs, whose names end in _k1, _k2 or _k3."""


def correction(source: Source) -> Iterator[Outcome]:
    """Yield corrections of the engine's mismatch: importance weights, rejection, and old log-probs of the engine."""
    bypass = bool(source[f"{_CORRECTION}.bypass_mode"])
    if is_reinforce(source):
        yield from _reinforce_weights(source)
        yield from _rejection(source, bypass)
        return
    yield from _weights(source, bypass)
    if bypass:
        yield from _bypass(source)
    elif source[f"{_CORRECTION}.use_policy_gradient"]:
        yield gone("PPO's loss is here; nearest: leave it out", f"{_CORRECTION}.use_policy_gradient", objective=True)
    yield from _rejection(source, bypass)


def _weights(source: Source, bypass: bool) -> Iterator[Outcome]:
    """Yield algo.tis. Old versions have a cap alone, which is of the weights of tokens."""
    weights, cap, mean = (
        f"{_CORRECTION}.{name}" for name in ("rollout_is", "rollout_is_threshold", "rollout_is_batch_normalize")
    )
    old_cap = f"{_ACTOR}.tis_imp_ratio_cap"
    if source[old_cap] is not None and source[old_cap] > 0:
        value = {"mode": "truncate", "cap": source[old_cap]}
        yield Outcome("converted", (old_cap,), "algo.tis", value, "weights per token" + _without_log_probs(source))
    elif source[weights] in (None, False, "null"):
        return
    elif bypass:
        yield Outcome("meaningless", (weights,), note="with bypass_mode the ratio holds the weights already")
    elif source[weights] not in ("token", "sequence"):
        yield gone(f"importance weights {source[weights]}: its level is not known here", weights, objective=True)
    elif source[cap] is None:
        yield Outcome("meaningless", (weights,), note="without rollout_is_threshold there are no weights")
    else:
        level = {} if source[weights] == "token" else {"level": source[weights]}
        note = "truncated importance weights" + _without_log_probs(source)
        yield Outcome("converted", (weights,), "algo.tis", {"mode": "truncate", **level}, note)
        yield Outcome("same", (cap,), "algo.tis", {"cap": source[cap]})
        if source[mean]:
            yield Outcome("same", (mean,), "algo.tis", {"normalize": True})


def _without_log_probs(source: Source) -> str:
    """Return what to say about a correction that verl b178a3c leaves out, because its engine returns no log-probs."""
    return "" if source[_LOG_PROBS] else "; verl b178a3c corrects nothing unless rollout.calculate_log_probs is True"


def _bypass(source: Source) -> Iterator[Outcome]:
    """Yield what bypass_mode says: the engine's log-probs are the old ones, in PPO's clipped loss. REINFORCE is elsewhere."""
    kind, older = f"{_CORRECTION}.loss_type", f"{_CORRECTION}.use_policy_gradient"
    yield became(source, "algo.old_logprobs", "rollout", f"{_CORRECTION}.bypass_mode", note="those of the engine")
    if source[kind] not in ("ppo_clip", None):
        yield gone("there is no such loss here; nearest: ppo_clip, reinforce", kind, objective=True)
    elif source[older]:
        yield gone("an older name of a REINFORCE loss; nearest: loss_type reinforce", older, objective=True)


def _reinforce_weights(source: Source) -> Iterator[Outcome]:
    """Yield old log-probs and importance weights of REINFORCE. Those of tokens are in the clip bounds, see `reinforce`; those of
    responses are algo.tis, which takes the policy before the rollout step where verl takes that of each gradient step."""
    bypass, weights, cap, mean = (
        f"{_CORRECTION}.{end}"
        for end in ("bypass_mode", "rollout_is", "rollout_is_threshold", "rollout_is_batch_normalize")
    )
    level = source[weights]
    if level != "sequence":
        yield became(source, "algo.old_logprobs", "rollout", bypass, note="those of the engine")
        if level == "token" and source[cap] < 1:
            yield gone(
                "weights below 1 on all tokens: no clip bounds say that; nearest: a cap of 1", cap, objective=True
            )
        elif level not in (None, False, "null", "token"):
            yield gone(f"importance weights {level}: its level is not known here", weights, objective=True)
        if level == "token" and source[mean]:
            yield gone("REINFORCE's weights per token are not divided by their mean", mean, objective=True)
        return
    yield became(source, "algo.old_logprobs", "actor", bypass, note="weights of responses need those of the actor")
    yield Outcome("converted", (weights,), "algo.tis", {"mode": "truncate", "level": "sequence"}, "truncated weights")
    yield Outcome("same", (cap,), "algo.tis", {"cap": source[cap]})
    if source[mean]:
        yield Outcome("same", (mean,), "algo.tis", {"normalize": True})
    one_step = (
        source["data.train_batch_size"] == source[f"{_ACTOR}.ppo_mini_batch_size"]
        and source[f"{_ACTOR}.ppo_epochs"] == 1
    )
    if source[mean] or not one_step:
        yield gone(
            "verl finds these weights at each gradient step, with its policy and the mean over a micro-batch; here they are those of "
            "the policy before the rollout step, with the step's mean; nearest: what is written",
            weights,
            objective=True,
        )


def _rejection(source: Source, bypass: bool) -> Iterator[Outcome]:
    """Yield algo.rejection: one criterion per name of rollout_rs, and the veto of older versions."""
    key, bound, veto = (
        f"{_CORRECTION}.rollout_rs",
        f"{_CORRECTION}.rollout_rs_threshold",
        f"{_CORRECTION}.rollout_token_veto_threshold",
    )
    names = [name.strip() for name in str(source[key] or "").split(",") if name.strip() not in ("", "null", "None")]
    if unknown := [name for name in names if _criterion(name, 1, None) is None]:
        yield gone(f"no rejection by {unknown[0]} here; nearest: {', '.join(_LEVELS)}", key, objective=True)
        return
    bounds = str(source[bound] if source[bound] is not None else source[f"{_CORRECTION}.rollout_is_threshold"]).split(
        ","
    )
    lower = source[f"{bound}_lower"]
    criteria = [_criterion(name, bounds[min(place, len(bounds) - 1)], lower) for place, name in enumerate(names)]
    if source[veto] is not None:
        criteria.append({"level": "every", "lower": float(source[veto])})
    if criteria:
        used = tuple(name for name in (key, bound, f"{bound}_lower", veto) if source[name] is not None)
        note = "bounds of π_train / π_rollout" + _without_log_probs(source)
        if source["algorithm.adv_estimator"] == "gae":
            note += "; with GAE, rejected tokens stay steps"
        if bypass:
            note += "; of the policy before the rollout step, where verl takes that of each gradient step"
        yield Outcome("converted", used, "algo.rejection", criteria, note)


def _criterion(name: str, bound: float | str, lower: float | None) -> dict[str, Any] | None:
    """Return one criterion; None for a name that is not known. verl's `lower_upper` of k1 bounds π_rollout / π_train, the inverse
    of our ratio; its single bounds, and those of versions before the names with k1, are bounds of both."""
    level, _, measure = name.rpartition("_k")
    if level in _LEVELS and measure in ("2", "3"):
        return {"level": _LEVELS[level], "measure": f"k{measure}", "upper": float(bound)}
    if level in _LEVELS and measure == "1" and level != "seq_max":
        inverse_low, _, inverse_high = str(bound).partition("_")
        low, high = (
            (1 / float(inverse_high), 1 / float(inverse_low)) if inverse_high else (1 / float(bound), float(bound))
        )
        return {"level": _LEVELS[level], "lower": _short(low), "upper": _short(high)}
    if name in ("token", "sequence", "geometric"):
        return {
            "level": name,
            "lower": _short(1 / float(bound)) if lower is None else float(lower),
            "upper": float(bound),
        }
    return None


def _short(bound: float) -> float:
    """Return the number to 6 places: 1 / 1.001 need not be written with 16."""
    return float(f"{bound:.6g}")


def is_reinforce(source: Source) -> bool:
    """Return True for the loss -w · A · log π: in bypass mode verl takes it whatever policy_loss says."""
    return bool(source[f"{_CORRECTION}.bypass_mode"]) and source[f"{_CORRECTION}.loss_type"] == "reinforce"


def reinforce(source: Source) -> Iterator[Outcome]:
    """Yield REINFORCE as CISPO, -sg(clip(r)) · A · log π: its bounds make the clipped ratio 1, or w = min(π / π_rollout, cap)."""
    kind, weights, cap = (f"{_CORRECTION}.{end}" for end in ("loss_type", "rollout_is", "rollout_is_threshold"))
    yield Outcome("converted", (kind,), "algo.policy_loss", "cispo", "REINFORCE: the same with these bounds, exact")
    if source[weights] == "token" and source[cap] >= 1:
        yield Outcome("converted", (weights, kind), "algo.clip_low", 1.0, "weights have no lower bound")
        yield Outcome(
            "converted", (cap, kind), "algo.clip_high", _short(source[cap] - 1), f"a ratio of at most {source[cap]}"
        )
    else:
        yield Outcome("converted", (kind,), "algo.clip_low", 0.0, "REINFORCE has no ratio: it is clipped to 1")
        yield Outcome("converted", (kind,), "algo.clip_high", 0.0, "REINFORCE has no ratio: it is clipped to 1")
    for key in (*LOSS_NAMES, f"{_ACTOR}.clip_ratio_c"):
        if source.gives(key):
            yield Outcome("meaningless", (key,), note="REINFORCE in bypass mode has no such loss or bound")
