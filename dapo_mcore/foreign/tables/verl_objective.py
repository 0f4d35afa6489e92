"""Rules of verl's table about the objective: advantages, policy loss, KL, corrections, rewards and tools.

Change here: how settings of verl that together say what is optimised become ours. Nothing unknown may become GRPO.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dapo_mcore.foreign.table import Outcome, Source, asked, became, gone

_ACTOR = "actor_rollout_ref.actor"
_COV = f"{_ACTOR}.policy_loss"
_TURNS = "actor_rollout_ref.rollout.multi_turn"
_CORRECTION = "algorithm.rollout_correction"
_KL = {"kl": "k1", "k1": "k1", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}
_LOSSES = {"vanilla": "clip", "gspo": "gspo", "cispo": "cispo", "clip_cov": "clip_cov", "kl_cov": "kl_cov"}
_LOSS_NAMES = (f"{_COV}.loss_mode", f"{_ACTOR}.loss_mode")
_TOKEN_MEAN = (
    "over all tokens of a gradient step; verl's old workers, which are its default, average each micro-batch by itself, which is "
    "token-mean-microbatch"
)
_LEVELS = {"token": "token", "seq_sum": "sequence", "seq_mean": "geometric", "seq_max": "every"}
"""Levels of verl's rollout_rs, whose names end in _k1, _k2 or _k3."""
_ENTRIES = ("verl.trainer.main_ppo", "verl.experimental.transfer_queue.main_ppo", "recipe.dapo.main_dapo",
            "recipe.dapo.src.main_dapo", "dapo.main_dapo", "recipe.dapo.dapo_transfer_queue.main_dapo")  # fmt: skip


def program(source: Source) -> Iterator[Outcome]:
    """Yield what another program than main_ppo and main_dapo costs: its trainer may optimise something else."""
    entry = source.run.entry.replace("/", ".").removesuffix(".py")
    if entry and "one_step_off" not in entry and not any(entry.endswith(known) for known in _ENTRIES):
        yield gone(
            "this program has a trainer of its own, whose objective the table does not know; nearest: main_ppo with the same "
            "settings",
            source.run.entry,
            objective=True,
        )


CONFIGURATION = "config-name"
"""The setting that read_verl makes of a `--config-name` whose file it could not read."""
UNREAD_CONFIGURATION = (
    "the settings of that configuration's file are not in the import: it is not beside the script; nearest: import the "
    "configuration that hydra has resolved (outputs/DATE/TIME/.hydra/config.yaml)"
)


def estimator(source: Source) -> Iterator[Outcome]:
    """Yield algo.advantage and its parts. An estimator without a counterpart is lost, whatever else is set."""
    key, by_std = "algorithm.adv_estimator", "algorithm.norm_adv_by_std_in_grpo"
    if not source.is_known(key):
        note = "the script alone does not say the estimator: group for grpo and rloo, gae for gae; others are not here"
        yield asked("algo.advantage", note, key)
        return
    name = source[key]
    if name in ("grpo", "grpo_vectorized"):
        yield became(source, "algo.advantage", "group", key, note="a response against the others to its prompt")
        std = "unbiased" if source[by_std] else "none"
        yield became(source, "algo.advantage_std", std, by_std, note="Dr. GRPO" if std == "none" else "divisor n - 1")
    elif name in ("rloo", "rloo_vectorized"):
        yield became(source, "algo.advantage", "group", key)
        yield became(source, "algo.advantage_baseline", "leave-one-out", key, note="the mean of the other responses")
        yield became(source, "algo.advantage_std", "none", key)
    elif name == "reinforce_plus_plus_baseline":
        yield became(source, "algo.advantage", "group", key)
        yield became(source, "algo.advantage_std", "batch", key, note="whitened over all loss tokens of the step")
    elif name == "gae":
        yield became(source, "algo.advantage", "gae", key)
        yield became(source, "algo.gamma", source["algorithm.gamma"], "algorithm.gamma")
        yield became(source, "algo.lam", source["algorithm.lam"], "algorithm.lam")
    else:
        yield gone(
            f"there is no estimator {name} here, and none is put in its place; nearest: grpo, rloo, "
            f"reinforce_plus_plus_baseline, gae",
            key,
            objective=True,
        )


def policy_loss(source: Source) -> Iterator[Outcome]:
    """Yield algo.policy_loss with the settings of KL-Cov and Clip-Cov, and the bound of dual clipping."""
    key = source.first(*_LOSS_NAMES)
    name = source[key]
    if name not in _LOSSES:
        yield gone(
            f"there is no policy loss {name} here, and none is put in its place; nearest: {', '.join(_LOSSES)}",
            key,
            objective=True,
        )
        return
    yield became(source, "algo.policy_loss", _LOSSES[name], key, note="PPO's clipped loss" if name == "vanilla" else "")
    if name == "kl_cov":
        yield _part(source, "algo.kl_cov", "ratio", f"{_COV}.kl_cov_ratio", f"{_ACTOR}.k_percent")
        yield _part(source, "algo.kl_cov", "coef", f"{_COV}.ppo_kl_coef", f"{_ACTOR}.ppo_kl_coef")
    if name == "clip_cov":
        yield _part(
            source,
            "algo.clip_cov",
            "ratio",
            f"{_COV}.clip_cov_ratio",
            f"{_ACTOR}.clip_cov_ratio",
            f"{_ACTOR}.clip_ratio_cov",
        )
        yield _part(source, "algo.clip_cov", "lower", f"{_COV}.clip_cov_lb", f"{_ACTOR}.clip_cov_lb")
        yield _part(source, "algo.clip_cov", "upper", f"{_COV}.clip_cov_ub", f"{_ACTOR}.clip_cov_ub")
    bound = f"{_ACTOR}.clip_ratio_c"
    if name == "vanilla":
        yield became(source, "algo.dual_clip", source[bound], bound)
    elif source.gives(bound):
        yield Outcome("meaningless", (bound,), note=f"verl's {name} has no such bound")


def _part(source: Source, ours: str, part: str, *keys: str) -> Outcome:
    key = source.first(*keys)
    value = source[key]
    if key.endswith("k_percent"):
        return Outcome("converted", (key,), ours, {part: value / 100}, "percent / 100")
    return Outcome("same", (key,), ours, {part: value})


def clip_bounds(source: Source) -> Iterator[Outcome]:
    """Yield the clip bounds. `clip_ratio` alone is asked for: verl reads it up to 0.4 and ignores it at b178a3c."""
    both = f"{_ACTOR}.clip_ratio"
    for end in ("low", "high"):
        key, ours = f"{_ACTOR}.clip_ratio_{end}", f"algo.clip_{end}"
        if end == "low" and source[key] > 1:
            yield became(source, ours, 1.0, key, note="no bound: a ratio is never below 0")
        elif not source.gives(key) and source.gives(both) and source[both] != source[key]:
            yield asked(
                ours,
                f"clip_ratio={source[both]} held in old versions; b178a3c ignores it and takes {source[key]}",
                both,
            )
        else:
            yield became(source, ours, source[key], key)


def loss_mode(source: Source) -> Iterator[Outcome]:
    """Yield how token losses become one number."""
    key, name = f"{_ACTOR}.loss_agg_mode", source[f"{_ACTOR}.loss_agg_mode"]
    if source[source.first(*_LOSS_NAMES)] == "gspo":
        note = "" if name == "seq-mean-token-mean" else "gspo: verl takes the mean over responses whatever is set"
        yield became(source, "algo.loss_mode", "seq-mean-token-mean", key, note=note)
        return
    notes = {
        "token-mean": _TOKEN_MEAN,
        "seq-mean-token-sum-norm": "divided by the sequences of a gradient step, too, which verl b178a3c leaves out",
    }
    if source["trainer.use_legacy_worker_impl"] == "disable":
        del notes["token-mean"]
    keys = (key,) if source.gives(key) or name not in notes else (source.run.entry or key,)
    note = ("" if source.gives(key) else "verl's default: ") + notes.get(name, "")
    yield Outcome("converted" if name in notes else "same", keys, "algo.loss_mode", name, note if name in notes else "")
    length = f"{_ACTOR}.loss_scale_factor"
    if source[length] is not None:
        yield became(source, "algo.loss_length", source[length], length)


def kl(source: Source) -> Iterator[Outcome]:
    """Yield the KL penalty. A coefficient whose switch is off becomes 0."""
    in_reward, in_loss = "algorithm.use_kl_in_reward", f"{_ACTOR}.use_kl_loss"
    coefs = {in_reward: "algorithm.kl_ctrl.kl_coef", in_loss: f"{_ACTOR}.kl_loss_coef"}
    kinds = {in_reward: "algorithm.kl_penalty", in_loss: f"{_ACTOR}.kl_loss_type"}
    on = [switch for switch in (in_loss, in_reward) if source[switch]]
    if len(on) == 2:
        yield gone(
            "a KL in the reward and one in the loss together; here there is one of them", in_reward, objective=True
        )
    if not on:
        for switch, coef in coefs.items():
            if source.gives(coef) or source.gives(switch):
                given = coef if source.gives(coef) else switch
                yield Outcome("converted", (given, switch), "algo.kl.coef", 0.0, f"{switch.rpartition('.')[2]} is off")
        return
    switch = on[0]
    yield became(source, "algo.kl.coef", source[coefs[switch]], coefs[switch])
    yield became(source, "algo.kl.place", "loss" if switch == in_loss else "reward", switch, note="the switch is on")
    kind = str(source[kinds[switch]])
    if kind.endswith("+") and kind[:-1] in _KL and switch == in_loss:
        note = f"exact: {kind} has the gradient of k2, and a value that is only reported"
        yield became(source, "algo.kl.estimator", "k2", kinds[switch], note=note)
    elif kind.removesuffix("+") in _KL:
        ours = _KL[kind.removesuffix("+")]
        yield became(source, "algo.kl.estimator", ours, kinds[switch], note="verl's name" if kind != ours else "")
    else:
        yield gone(f"there is no KL estimator {kind} here; nearest: low_var_kl (k3)", kinds[switch], objective=True)
    if switch == in_reward and source["algorithm.kl_ctrl.type"] == "adaptive":
        yield gone("the coefficient stays fixed; nearest: its first value", "algorithm.kl_ctrl.type", objective=True)


def entropy(source: Source) -> Iterator[Outcome]:
    """Yield the entropy bonus, fixed or adaptive (Skywork-OR1)."""
    key, adaptive = f"{_ACTOR}.entropy_coeff", f"{_ACTOR}.adaptive_entropy"
    yield became(source, "algo.entropy_coef", source[key], key)
    names = {
        "target_entropy": "target",
        "delta_ent_coef": "delta",
        "max_ent_coef": "max_coef",
        "min_ent_coef": "min_coef",
    }
    if not source[f"{adaptive}.enabled"]:
        return
    for name, part in names.items():
        if source[f"{adaptive}.{name}"] is not None:
            value = {part: source[f"{adaptive}.{name}"]}
            yield Outcome("same", (f"{adaptive}.{name}", f"{adaptive}.enabled"), "algo.adaptive_entropy", value)


def correction(source: Source) -> Iterator[Outcome]:
    """Yield corrections of the engine's mismatch: importance weights, rejection, and old log-probs of the engine."""
    weights, cap = f"{_CORRECTION}.rollout_is", f"{_CORRECTION}.rollout_is_threshold"
    old_cap = f"{_ACTOR}.tis_imp_ratio_cap"
    bypass = bool(source[f"{_CORRECTION}.bypass_mode"])
    if source[old_cap] is not None and source[old_cap] > 0:
        yield Outcome(
            "converted", (old_cap,), "algo.tis", {"mode": "truncate", "cap": source[old_cap]}, "weights per token"
        )
    elif source[weights] in ("token", "sequence") and not bypass:
        level = {} if source[weights] == "token" else {"level": source[weights]}
        yield Outcome(
            "converted", (weights,), "algo.tis", {"mode": "truncate", **level}, "truncated importance weights"
        )
        yield Outcome("same", (cap,), "algo.tis", {"cap": source[cap]})
    elif source[weights] not in (None, False, "null") and bypass:
        yield Outcome("meaningless", (weights,), note="with bypass_mode the ratio holds the weights already")
    elif source[weights] not in (None, False, "null"):
        yield gone(f"importance weights {source[weights]}: its level is not known here", weights, objective=True)
    if bypass:
        yield became(source, "algo.old_logprobs", "rollout", f"{_CORRECTION}.bypass_mode", note="those of the engine")
        if source[f"{_CORRECTION}.loss_type"] != "ppo_clip":
            yield gone("no REINFORCE loss here; nearest: ppo_clip", f"{_CORRECTION}.loss_type", objective=True)
    if source[f"{_CORRECTION}.rollout_is_batch_normalize"] and source[weights] and not bypass:
        yield Outcome("same", (f"{_CORRECTION}.rollout_is_batch_normalize",), "algo.tis", {"normalize": True})
    yield from _rejection(source)


def _rejection(source: Source) -> Iterator[Outcome]:
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
        yield Outcome("converted", used, "algo.rejection", criteria, "bounds of π_train / π_rollout")


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


def reward(source: Source) -> Iterator[Outcome]:
    """Yield the reward function: the script's own, or the rule that a row's data_source names."""
    path, name = (
        source.first("custom_reward_function.path", "reward.custom_reward_function.path"),
        "custom_reward_function.name",
    )
    manager = source.first("reward_model.reward_manager", "reward.reward_manager.name", "reward_manager.name")
    if source[manager] not in ("naive", "dapo", "prime", None):
        note = f"there is no reward manager {source[manager]} here"
        yield gone(
            f"{note}; nearest: a function of one response, reward.function path.py:name", manager, objective=True
        )
    if source.path(path) is not None:
        function = f"{source.path(path)}:{source[source.first(name, 'reward.custom_reward_function.name')]}"
        yield Outcome("converted", (path, name, manager), "reward.function", function, "called with verl's arguments")
    else:
        yield Outcome(
            "converted", (manager,), "reward.function", "by_source", "the rule that a row's data_source names"
        )
    kwargs = source.below("custom_reward_function.reward_kwargs") | source.below(
        "reward.custom_reward_function.reward_kwargs"
    )
    if kwargs:
        yield Outcome("same", ("custom_reward_function.reward_kwargs.*",), "reward.kwargs", kwargs)


def overlong(source: Source) -> Iterator[Outcome]:
    """Yield the soft punishment of overlong responses, under the names of three versions."""
    places = ("reward_model.overlong_buffer", "reward_model.reward_kwargs.overlong_buffer_cfg",
              "reward.reward_kwargs.overlong_buffer_cfg")  # fmt: skip
    place = next((place for place in places if source.gives(f"{place}.enable")), places[0])
    if not source[f"{place}.enable"]:
        for setting in source.run.settings:
            if "overlong_buffer" in setting.key or setting.key.endswith(".max_resp_len"):
                yield Outcome("meaningless", (setting.key,), note="overlong_buffer is off")
        return
    yield became(source, "reward.overlong.penalty", True, f"{place}.enable")
    yield became(source, "reward.overlong.cache", source[f"{place}.len"], f"{place}.len")
    yield became(source, "reward.overlong.factor", source[f"{place}.penalty_factor"], f"{place}.penalty_factor")
    longest = source.first(
        "reward_model.reward_kwargs.max_resp_len", "reward.reward_kwargs.max_resp_len", "reward_model.max_resp_len"
    )
    if source[longest] not in (None, source["data.max_response_length"]):
        yield became(source, "reward.overlong.max_length", source[longest], longest)


def tools(source: Source) -> Iterator[Outcome]:
    """Yield what a run with tools loses: the tools are to be written in our section `tools`."""
    files = [key for key in (f"{_TURNS}.tool_config_path", f"{_TURNS}.interaction_config_path") if source.gives(key)]
    if source[f"{_TURNS}.enable"] or (files and source.gives(CONFIGURATION)):
        key = files[0] if files else f"{_TURNS}.enable"
        yield gone(
            "the tools and interactions are not read, and without them the policy learns another task; nearest: write them in the section tools, as "
            "examples/retool.yaml does, and their limits in agent",
            key,
            *files[1:],
            objective=True,
        )
