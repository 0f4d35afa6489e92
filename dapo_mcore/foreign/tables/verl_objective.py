"""Rules of verl's table about the objective: advantages, policy loss, KL, rewards and tools.

Change here: how settings of verl that together say what is optimised become ours. Nothing unknown may become GRPO.
"""

from __future__ import annotations

from collections.abc import Iterator

from dapo_mcore.foreign.table import Outcome, Source, asked, became, gone
from dapo_mcore.foreign.tables.verl_correction import LOSS_NAMES, is_reinforce, reinforce
from dapo_mcore.foreign.tables.verl_defaults import is_megatron

_ACTOR = "actor_rollout_ref.actor"
_COV = f"{_ACTOR}.policy_loss"
_GROUP = "actor_rollout_ref.rollout.n"
_AGENT = "actor_rollout_ref.rollout.agent.default_agent_loop"
_TURNS = "actor_rollout_ref.rollout.multi_turn"
POLICY_LOSS = tuple(
    f"{_COV}.{name}"
    for name in ("loss_mode", "kl_cov_ratio", "ppo_kl_coef", "clip_cov_ratio", "clip_cov_lb", "clip_cov_ub")
)
"""The settings of actor.policy_loss."""
ADAPTIVE_ENTROPY = tuple(
    f"{_ACTOR}.adaptive_entropy.{name}"
    for name in ("enabled", "target_entropy", "delta_ent_coef", "max_ent_coef", "min_ent_coef")
)
"""Skywork-OR1's settings of the adaptive entropy."""
_OVERLONG = ("reward_model.overlong_buffer", "reward_model.reward_kwargs.overlong_buffer_cfg",
             "reward.reward_kwargs.overlong_buffer_cfg")  # fmt: skip
_LONGEST = ("reward_model.reward_kwargs.max_resp_len", "reward.reward_kwargs.max_resp_len", "reward_model.max_resp_len")
OVERLONG = (*(f"{place}.{name}" for place in _OVERLONG for name in ("enable", "len", "penalty_factor")), *_LONGEST)
"""The settings of the overlong punishment, under the names of three versions."""
_KL = {"kl": "k1", "k1": "k1", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}
_KL_PLACES = {
    f"{_ACTOR}.use_kl_loss": ("loss", f"{_ACTOR}.kl_loss_coef", f"{_ACTOR}.kl_loss_type"),
    "algorithm.use_kl_in_reward": ("reward", "algorithm.kl_ctrl.kl_coef", "algorithm.kl_penalty"),
}
"""Each switch with our place, and the keys of its coefficient and its estimator."""
_ALIKE = (
    "over all responses of a gradient step; verl's old Megatron workers, which are its default, weigh each micro-batch alike, "
    "however many responses it has"
)
_LOSSES = {"vanilla": "clip", "gspo": "gspo", "cispo": "cispo", "clip_cov": "clip_cov", "kl_cov": "kl_cov"}
_BYPASS = "algorithm.rollout_correction.bypass_mode"
_TOKEN_MEAN = (
    "over all tokens of a gradient step; verl's old workers, which are its default, average each micro-batch by itself, which is "
    "token-mean-microbatch"
)
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
    "this configuration is none of verl's own, and its file, which lies neither beside the script nor above it, is not read; "
    "nearest: import the configuration that hydra has resolved (outputs/DATE/TIME/.hydra/config.yaml)"
)


def estimator(source: Source) -> Iterator[Outcome]:
    """Yield algo.advantage and its parts. An estimator without a counterpart is lost, whatever else is set."""
    key, by_std = "algorithm.adv_estimator", "algorithm.norm_adv_by_std_in_grpo"
    if not source.is_known(key):
        note = (
            "the script alone does not say the estimator: group for grpo and rloo, gae for gae, then with the script's critic in the "
            "section critic; others are not here"
        )
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
        return
    if name != "gae" and source.is_known(_GROUP) and source[_GROUP] == 1:
        yield gone(
            f"with one response per prompt verl's {name} takes the reward itself; here an advantage is against the other responses to "
            "the prompt, so it would be 0; nearest: rollout.group_size 8",
            _GROUP if source.gives(_GROUP) else key,
            objective=True,
        )


def policy_loss(source: Source) -> Iterator[Outcome]:
    """Yield algo.policy_loss with the settings of KL-Cov and Clip-Cov, and the bound of dual clipping."""
    if is_reinforce(source):
        yield from reinforce(source)
        return
    key = source.first(*LOSS_NAMES)
    name = source[key]
    if source[_BYPASS] and name in (*_LOSSES, "bypass_mode"):
        note = "with bypass_mode verl takes PPO's clipped loss" + ("" if name == "vanilla" else ", whatever is set")
        yield became(source, "algo.policy_loss", "clip", key, _BYPASS, note=note)
        yield became(source, "algo.dual_clip", source[f"{_ACTOR}.clip_ratio_c"], f"{_ACTOR}.clip_ratio_c")
        return
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
    """Yield the clip bounds; null is clip_ratio. `clip_ratio` alone is asked for: verl reads it up to 0.4 and ignores it at b178a3c."""
    both = f"{_ACTOR}.clip_ratio"
    if is_reinforce(source):
        for key in filter(source.gives, (both, f"{both}_low", f"{both}_high")):
            yield Outcome("meaningless", (key,), note="REINFORCE in bypass mode does not clip")
        return
    for end in ("low", "high"):
        key, ours = f"{_ACTOR}.clip_ratio_{end}", f"algo.clip_{end}"
        of = both if source[key] is None else key
        value = source[of]
        if end == "low" and value > 1:
            yield became(source, ours, 1.0, of, note="no bound: a ratio is never below 0")
        elif not source.gives(key) and source.gives(both) and source[both] != value:
            yield asked(
                ours, f"clip_ratio={source[both]} held in old versions; b178a3c ignores it and takes {value}", both
            )
        else:
            yield became(source, ours, value, of)


def loss_mode(source: Source) -> Iterator[Outcome]:
    """Yield how token losses become one number."""
    key, name = f"{_ACTOR}.loss_agg_mode", source[f"{_ACTOR}.loss_agg_mode"]
    if source[source.first(*LOSS_NAMES)] == "gspo" and not source[_BYPASS]:
        note = "" if name == "seq-mean-token-mean" else "gspo: verl takes the mean over responses whatever is set"
        yield became(source, "algo.loss_mode", "seq-mean-token-mean", key, note=note)
        return
    notes = {
        "token-mean": _TOKEN_MEAN,
        "seq-mean-token-sum-norm": "divided by the sequences of a gradient step, too, which verl b178a3c leaves out: its gradients are "
        "larger by that, so that clip_grad cuts them more often",
    }
    new_workers = source["trainer.use_legacy_worker_impl"] == "disable"
    if new_workers:
        del notes["token-mean"]
    elif is_megatron(source.run) and source[f"{_ACTOR}.use_dynamic_bsz"]:
        notes |= dict.fromkeys(("seq-mean-token-mean", "seq-mean-token-sum"), _ALIKE)
    keys = (key,) if source.gives(key) or name not in notes else (source.run.entry or key,)
    note = ("" if source.gives(key) else "verl's default: ") + notes.get(name, "")
    yield Outcome("converted" if name in notes else "same", keys, "algo.loss_mode", name, note if name in notes else "")
    length = f"{_ACTOR}.loss_scale_factor"
    if source[length] is not None and name == "seq-mean-token-sum-norm" and not new_workers:
        note = "verl's old workers, its default, divide by the longest response whatever is set, and so is it here"
        yield Outcome("meaningless", (length,), note=note)
    elif source[length] is not None and name == "seq-mean-token-sum-norm":
        yield became(source, "algo.loss_length", source[length], length)


def kl(source: Source) -> Iterator[Outcome]:
    """Yield the KL penalty. A coefficient whose switch is off becomes 0."""
    open_switches = [switch for switch in _KL_PLACES if not source.is_known(switch)]
    on = [switch for switch in _KL_PLACES if switch in open_switches or source[switch]]
    if len(on) == 2:
        what = "a KL in the reward and one in the loss together; here there is one of them"
        yield gone(what, *_given(source, on[1], *_KL_PLACES[on[1]][1:]), objective=True)
    if not on:
        yield from _no_kl(source)
        return
    switch = on[0]
    place, coef, kind = _KL_PLACES[switch]
    if switch in open_switches:
        note = (
            f"{source[coef]:g} if {switch.rpartition('.')[2]} turns out to be True, else 0: the script does not say it"
        )
        yield asked("algo.kl.coef", note, switch, coef)
    else:
        yield became(source, "algo.kl.coef", source[coef], coef)
    yield Outcome(
        "converted",
        (switch,),
        "algo.kl.place",
        place,
        "the switch is on" if switch not in open_switches else "if it is on",
    )
    yield from _kl_estimator(source, kind, switch)
    if place == "reward" and source["algorithm.kl_ctrl.type"] == "adaptive":
        parts = [f"algorithm.kl_ctrl.{name}" for name in ("type", "target_kl", "horizon")]
        yield gone("the coefficient stays fixed; nearest: its first value", *_given(source, *parts), objective=True)


def _given(source: Source, switch: str, *parts: str) -> tuple[str, ...]:
    """Return a switch and those of its parts that the run sets: they share its fate."""
    return (switch, *filter(source.gives, parts))


def _no_kl(source: Source) -> Iterator[Outcome]:
    """Yield the coefficient 0 where the run sets one, or a switch that is off."""
    for switch, (place, coef, _) in _KL_PLACES.items():
        if source.gives(coef) or source.gives(switch):
            note = f"{switch.rpartition('.')[2]} is off"
            if place == "reward" and source[coef] and not source.gives(switch):
                note += "; verl before 0.3 has no such switch, and takes the coefficient unless use_kl_loss is on"
            yield Outcome("converted", (coef if source.gives(coef) else switch, switch), "algo.kl.coef", 0.0, note)


def _kl_estimator(source: Source, key: str, switch: str) -> Iterator[Outcome]:
    kind = str(source[key])
    if kind.endswith("+") and kind[:-1] in _KL and _KL_PLACES[switch][0] == "loss":
        note = f"exact: {kind} has the gradient of k2, and a value that is only reported"
        yield became(source, "algo.kl.estimator", "k2", key, note=note)
    elif kind.removesuffix("+") in _KL:
        ours = _KL[kind.removesuffix("+")]
        yield became(source, "algo.kl.estimator", ours, key, note="verl's name" if kind != ours else "")
    else:
        yield gone(f"there is no KL estimator {kind} here; nearest: low_var_kl (k3)", key, objective=True)


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


def reward(source: Source) -> Iterator[Outcome]:
    """Yield the reward function: the script's own, or the rule that a row's data_source names."""
    place = source.first("custom_reward_function.path", "reward.custom_reward_function.path").removesuffix(".path")
    path, name = f"{place}.path", f"{place}.name"
    manager = source.first("reward_model.reward_manager", "reward.reward_manager.name", "reward_manager.name")
    if source[manager] not in ("naive", "dapo", "prime", None):
        note = f"there is no reward manager {source[manager]} here"
        yield gone(
            f"{note}; nearest: a function of one response, reward.function path.py:name", manager, objective=True
        )
    if source.path(path):
        function = f"{source.path(path)}:{source[name] or 'compute_score'}"
        yield Outcome("converted", (path, name, manager), "reward.function", function, "called with verl's arguments")
    else:
        yield Outcome(
            "converted", (manager,), "reward.function", "by_source", "the rule that a row's data_source names"
        )


def reward_kwargs(source: Source) -> Iterator[Outcome]:
    """Yield the arguments of the script's own reward function."""
    for place in ("custom_reward_function", "reward.custom_reward_function"):
        whole = f"{place}.reward_kwargs"
        given = {**(source[whole] or {}), **source.below(whole)}
        if given and source.path(f"{place}.path"):
            keys = [key for key in (whole, *(f"{whole}.{name}" for name in given)) if source.gives(key)]
            yield Outcome("same", tuple(keys), "reward.kwargs", given)


def overlong(source: Source) -> Iterator[Outcome]:
    """Yield the soft punishment of overlong responses, under the names of three versions."""
    place = next((place for place in _OVERLONG if source.gives(f"{place}.enable")), _OVERLONG[0])
    if not source[f"{place}.enable"]:
        for key in OVERLONG:
            if source.gives(key):
                yield Outcome("meaningless", (key,), note="overlong_buffer is off")
        return
    yield became(source, "reward.overlong.penalty", True, f"{place}.enable")
    yield became(source, "reward.overlong.cache", source[f"{place}.len"], f"{place}.len")
    yield became(source, "reward.overlong.factor", source[f"{place}.penalty_factor"], f"{place}.penalty_factor")
    longest = source.first(*_LONGEST)
    if source[longest] not in (None, source["data.max_response_length"]):
        yield became(source, "reward.overlong.max_length", source[longest], longest)
    elif source.gives(longest):
        yield Outcome("meaningless", (longest,), note="data.max_response_length, as here")


def tools(source: Source) -> Iterator[Outcome]:
    """Yield what a run with tools loses: the tools are to be written in our section `tools`. verl b178a3c puts the schemas of a
    tool_config_path into every prompt, also where multi_turn.enable is off."""
    named = (f"{_TURNS}.tool_config_path", "data.tool_config_path")
    talks = (f"{_TURNS}.interaction_config_path",)
    on = source[f"{_TURNS}.enable"] or source[_AGENT] == "tool_agent" or source.gives(CONFIGURATION)
    files = [key for key in (*named, *(talks if on else ())) if source.gives(key) and source.path(key)]
    switch = f"{_TURNS}.enable" if source[f"{_TURNS}.enable"] else _AGENT if source[_AGENT] == "tool_agent" else ""
    if files or switch:
        yield gone(
            "the tools and interactions are not read, and without them the policy learns another task; nearest: write them in the section "
            "tools, as examples/retool.yaml does, and their limits in agent",
            *(files or (switch,)),
            objective=True,
        )
