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
_LEVELS = {"token": "token", "seq_sum": "sequence", "seq_mean": "geometric", "seq_max": "every"}
"""Levels of verl's rollout_rs, whose names end in _k1, _k2 or _k3."""


def correction(source: Source) -> Iterator[Outcome]:
    """Yield corrections of the engine's mismatch: importance weights, rejection, and old log-probs of the engine."""
    bypass = bool(source[f"{_CORRECTION}.bypass_mode"])
    yield from _weights(source, bypass)
    if bypass:
        yield from _bypass(source)
    elif source[f"{_CORRECTION}.use_policy_gradient"]:
        yield gone(
            "no REINFORCE loss here; nearest: leave it out", f"{_CORRECTION}.use_policy_gradient", objective=True
        )
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
    """Yield what bypass_mode says: the engine's log-probs are the old ones, in PPO's clipped loss or a REINFORCE loss."""
    kind, older = f"{_CORRECTION}.loss_type", f"{_CORRECTION}.use_policy_gradient"
    yield became(source, "algo.old_logprobs", "rollout", f"{_CORRECTION}.bypass_mode", note="those of the engine")
    if source[kind] not in ("ppo_clip", None):
        yield gone("no REINFORCE loss here; nearest: ppo_clip", kind, objective=True)
    elif source[older]:
        yield gone("no REINFORCE loss here; nearest: leave it out", older, objective=True)


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
