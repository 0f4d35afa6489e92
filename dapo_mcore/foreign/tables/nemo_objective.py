"""Rules of NeMo-RL's table about the objective: rewards, advantages, the policy loss, KL and corrections.

Change here: how keys of NeMo-RL that together say what is optimised become ours. Nothing unknown may become GRPO.
"""

from __future__ import annotations

from collections.abc import Iterator

from dapo_mcore.foreign.table import Outcome, Rule, Source, asked, became, gone

LOST_OF_THE_OBJECTIVE = {
    "grpo.advantage_clip_low": "advantages are not clipped",
    "grpo.advantage_clip_high": "advantages are not clipped",
    "grpo.invalid_tool_call_advantage": "no advantage of its own for invalid calls",
    "grpo.malformed_thinking_advantage": "no advantage of its own for malformed thoughts",
    "grpo.seq_logprob_error_threshold": "nearest: algo.rejection",
    "loss_fn.positive_example_nll_weight": "no likelihood term for right answers",
}


def reward(source: Source) -> Iterator[Outcome]:
    """Yield the reward function with its scaling: dapo_math_verify scaled to ±1 is math_dapo."""
    scaling, rule = "grpo.reward_scaling", "env.math.math_verify_impl"
    scales = [f"{scaling}.{end}" for end in ("source_min", "source_max", "target_min", "target_max")]
    scaled = tuple(source[key] for key in scales) if source[f"{scaling}.enabled"] else _AS_THEY_ARE
    used = tuple(key for key in (f"{scaling}.enabled", *scales) if source.gives(key))
    other = [place for place in _NAMES_OF_ENVIRONMENTS if source[place] not in (None, "math")]
    for place in other:
        what = f"the environment {source[place]}; nearest: a reward function path.py:name, tools"
        yield gone(what, place, objective=True)
    if other:
        note = f"a function of yours, path.py:name, in place of the environment {source[other[0]]}"
        yield asked("reward.function", note, *other)
    elif source[rule] == "dapo_math_verify" and scaled == _TO_PLUS_MINUS_ONE:
        yield Outcome("converted", (rule, *used), "reward.function", "math_dapo", "the paper's rule with ±1")
    else:
        if scaled not in (_AS_THEY_ARE, _TO_PLUS_MINUS_ONE):
            what = f"rewards scaled by {scaled}; nearest: a reward function path.py:name"
            yield gone(what, f"{scaling}.enabled", *used, objective=True)
        values = "±1" if scaled == _TO_PLUS_MINUS_ONE else "1 or 0"
        note = f"NeMo-RL's {source[rule]} gives {values}: math_verify compares values, math_dapo takes what follows `Answer:`; both ±1"
        yield asked("reward.function", note, rule, *used)
    workers = "env.math.num_workers"
    yield became(source, "reward.workers", source[workers], workers, note="processes")


_AS_THEY_ARE, _TO_PLUS_MINUS_ONE = (0.0, 1.0, 0.0, 1.0), (0.0, 1.0, -1.0, 1.0)
_NAMES_OF_ENVIRONMENTS = ("data.default.env_name", "data.train.env_name", "data.validation.env_name")


def _environments(source: Source) -> Iterator[Outcome]:
    """Yield the loss of each environment that is not a mathematical one, by the first of its keys."""
    others: dict[str, list[str]] = {}
    for setting in source.run.settings:
        section, name, *_ = [*setting.key.split("."), ""]
        if section == "env" and setting.value is False:
            yield Outcome("meaningless", (setting.key,), note="off, as here")
        elif setting.key == "env.math.verifier_type":
            if setting.value not in (None, "math"):
                yield gone(
                    "answers are compared in another way; nearest: a reward function", setting.key, objective=True
                )
        elif section == "env" and name == "math" and not setting.key.endswith(_OF_MATH):
            yield gone("not known to the table", setting.key)
        elif section == "env" and name == "dapo":
            yield Outcome("meaningless", (setting.key,), note="env.math says it")
        elif section == "env" and name != "math":
            others.setdefault("nemo_gym" if name.startswith("should_") else name, []).append(setting.key)
    for name, keys in others.items():
        what = "it gives the prompts or the rewards there; nearest: a reward function path.py:name, tools"
        yield gone(f"the environment {name}: {what}", *keys, objective=True)


_OF_MATH = (".num_workers", ".math_verify_impl", ".stop_strings")
ENVIRONMENTS = Rule(
    ("env.*",), (), _environments, "another environment than math; nearest: reward.function, tools", objective=True
)


def overlong(source: Source) -> Iterator[Outcome]:
    """Yield the soft punishment of overlong responses."""
    place = "grpo.reward_shaping"
    if source["grpo.overlong_filtering"]:
        yield became(source, "reward.overlong.filter", True, "grpo.overlong_filtering")
    stop = f"{place}.stop_properly_penalty_coef"
    if source[f"{place}.enabled"] and source[stop] is not None:
        yield gone("rewards of truncated responses are not scaled; nearest: reward.overlong", stop, objective=True)
    elif source[f"{place}.enabled"]:
        yield became(source, "reward.overlong.penalty", True, f"{place}.enabled")
        names = {
            "overlong_buffer_length": "cache",
            "overlong_buffer_penalty": "factor",
            "max_response_length": "max_length",
        }
        for key, ours in names.items():
            yield became(source, f"reward.overlong.{ours}", source[f"{place}.{key}"], f"{place}.{key}")


def estimator(source: Source) -> Iterator[Outcome]:
    """Yield algo.advantage and its parts."""
    key, std, mean = "grpo.adv_estimator.name", "grpo.normalize_rewards", "grpo.use_leave_one_out_baseline"
    if source[key] != "grpo":
        yield gone(
            f"there is no estimator {source[key]} here, and none is put in its place; nearest: grpo",
            key,
            objective=True,
        )
        return
    std, mean = (source.first(f"grpo.adv_estimator.{name.partition('.')[2]}", name) for name in (std, mean))
    std, mean = (name if source[name] is not None else f"grpo.{name.rpartition('.')[2]}" for name in (std, mean))
    yield became(source, "algo.advantage", "group", key, note="a response against the others to its prompt")
    kind, note = ("others", "of the other responses") if source[mean] else ("unbiased", "divisor n - 1")
    yield became(source, "algo.advantage_std", kind if source[std] else "none", std, note=note if source[std] else "")
    yield became(
        source, "algo.advantage_baseline", "leave-one-out" if source[mean] else "mean", mean, note="of the group"
    )


def policy_loss(source: Source) -> Iterator[Outcome]:
    """Yield algo.policy_loss, its bounds, and the losses of what is not here."""
    cispo, sequence, token = "loss_fn.use_cispo", "loss_fn.sequence_level_importance_ratios", "loss_fn.token_level_loss"
    plain = "loss_fn.disable_ppo_ratio"
    is_plain = source[plain] and not source["loss_fn.force_on_policy_ratio"]
    if is_plain:
        yield Outcome(
            "converted", (plain,), "algo.policy_loss", "cispo", "REINFORCE: CISPO whose ratio is clipped to 1"
        )
    elif source[cispo]:
        yield became(source, "algo.policy_loss", "cispo", cispo)
    elif source[sequence]:
        yield became(source, "algo.policy_loss", "gspo", sequence, note="a ratio per response")
    for end, key in (("low", "loss_fn.ratio_clip_min"), ("high", "loss_fn.ratio_clip_max")):
        if is_plain:
            yield Outcome("converted", (plain, key), f"algo.clip_{end}", 0.0, "REINFORCE has no ratio")
        else:
            yield became(source, f"algo.clip_{end}", source[key], key)
    yield became(source, "algo.dual_clip", source["loss_fn.ratio_clip_c"], "loss_fn.ratio_clip_c")
    mode = "token-mean" if source[token] else "seq-mean-token-mean"
    yield became(source, "algo.loss_mode", mode, token, note="over tokens" if source[token] else "over responses")
    for key, what in LOST_OF_THE_OBJECTIVE.items():
        is_zero = source[key] == 0 and key == "loss_fn.positive_example_nll_weight"
        if source[key] is not None and source[key] is not False and not is_zero:
            yield gone(what, key, objective=True)
    yield from _ratio(source)
    for key in ("top_p", "top_k"):
        value = source[f"policy.generation.{key}"]
        if value not in (None, -1, 1 if key == "top_p" else 0):
            what = f"NeMo-RL's log-probs are those within {key} {value}; here they are those of all tokens; nearest: top_p 1 without top_k"
            yield gone(what, f"policy.generation.{key}", objective=True)


def _ratio(source: Source) -> Iterator[Outcome]:
    """Yield the ratio that is 1 by force: it is so here with one gradient step per rollout step."""
    key, size = "loss_fn.force_on_policy_ratio", "policy.train_global_batch_size"
    step = source["grpo.num_prompts_per_step"] * source["grpo.num_generations_per_prompt"]
    if source[key] and source[size] == step:
        yield Outcome("meaningless", (key,), note="one gradient step per rollout step: the ratio is 1 here, too")
    elif source[key]:
        yield gone("the ratio is what it is; nearest: one gradient step a rollout step", key, objective=True)


def kl(source: Source) -> Iterator[Outcome]:
    """Yield the KL penalty."""
    coef, kind, place = (
        "loss_fn.reference_policy_kl_penalty",
        "loss_fn.reference_policy_kl_type",
        "loss_fn.use_kl_in_reward",
    )
    if source[place]:
        note = "use_kl_in_reward takes it out of the loss, and the estimator grpo adds it to no reward"
        yield Outcome("converted", (coef, place), "algo.kl.coef", 0.0, note)
        return
    yield became(source, "algo.kl.coef", source[coef], coef)
    if not source[coef]:
        for key in ("loss_fn.use_on_policy_kl_approximation", "loss_fn.kl_output_clamp_value", kind):
            if source.gives(key):
                yield Outcome("meaningless", (key,), note="there is no KL penalty")
        return
    yield became(source, "algo.kl.place", "loss", place, note="where it is added")
    if source[kind] == "k2":
        yield gone("k2 with the gradient of the sampling, too; nearest: k2, NeMo-RL's k1 and k3", kind, objective=True)
    else:
        yield became(source, "algo.kl.estimator", "k2", kind, note=_SCORED[source[kind]])
    if source["loss_fn.use_on_policy_kl_approximation"]:
        yield gone("the KL has no importance weight here", "loss_fn.use_on_policy_kl_approximation", objective=True)
    if source["loss_fn.kl_output_clamp_value"] not in (None, 10.0):
        yield gone("the penalty of a token has no limit here", "loss_fn.kl_output_clamp_value", objective=True)


_SCORED = {
    "k1": "NeMo-RL adds the gradient of the sampling to k1: k2 has that gradient, less noise of mean 0",
    "k3": "NeMo-RL adds the gradient of the sampling to k3, which makes it that of k2; beyond 10 nats it has none",
}
"""(p - r)∇p, with log-probs p of the policy and r of the reference: for k3 = exp(r - p) - 1 - (r - p) it is k3·∇p + ∇k3."""


def correction(source: Source) -> Iterator[Outcome]:
    """Yield importance weights against the engine's mismatch."""
    switch, kind = "loss_fn.use_importance_sampling_correction", "loss_fn.truncated_importance_sampling_type"
    if source[switch]:
        yield from _weights(source, switch)
    asynchronous, age = "grpo.async_grpo.enabled", "grpo.async_grpo.max_trajectory_age_steps"
    if source[asynchronous]:
        if source["policy.generation.colocated.enabled"]:
            what = "NeMo-RL generates ahead on the GPUs of training: 0 here, or 1 with rollout.sglang.colocated false and GPUs of their own"
            yield asked("rollout.async_steps", what, asynchronous)
        else:
            yield became(source, "rollout.async_steps", 1, asynchronous, note="generated one step ahead")
        if not source[switch] or source[kind] not in _WEIGHTS:
            note = "samples are one version older, and the run does not correct for it: truncate (cap 2), or mask"
            yield asked("algo.tis.mode", note, switch)
        flight = "grpo.async_grpo.in_flight_weight_updates"
        if source[flight]:
            yield gone("a response keeps its weights to its end; nearest: sampling.on_full keep", flight)
        if source[age] != 1:
            yield gone(f"samples are at most one version old, not {source[age]}", age)


_WEIGHTS = (None, "tis", "icepop", "seq-mask-tis")


def _weights(source: Source, switch: str) -> Iterator[Outcome]:
    """Yield algo.tis, and algo.rejection for seq-mask-tis."""
    kind, cap = "loss_fn.truncated_importance_sampling_type", "loss_fn.truncated_importance_sampling_ratio"
    least = f"{cap}_min"
    name, sequence = source[kind], "loss_fn.sequence_level_importance_ratios"
    if name not in _WEIGHTS:
        yield gone(f"there are no weights {name} here; nearest: tis, icepop, seq-mask-tis", kind, objective=True)
        return
    if name == "icepop":
        yield Outcome("converted", (kind, switch), "algo.tis.mode", "icepop", "0 outside the bounds")
    else:
        yield Outcome("converted", (switch,), "algo.tis.mode", "truncate", "truncated importance weights")
    if source[sequence]:
        yield Outcome("converted", (sequence,), "algo.tis.level", "sequence", "weights of responses, too")
    if source[cap] is None:
        yield Outcome("converted", (switch,), "algo.tis.cap", None, "weights have no bound")
    elif name == "seq-mask-tis":
        yield Outcome("converted", (kind,), "algo.tis.cap", None, "weights of tokens have no bound")
        bounds = {"level": "geometric", "lower": source[least], "upper": source[cap]}
        note = "weights of rejected responses are 0; they lose their KL and entropy terms, too, which they keep there"
        yield Outcome("converted", (kind, cap, least), "algo.rejection", [bounds], note)
        yield Outcome("converted", (kind,), "algo.rejection_divisor", "all", "rejected responses count in the divisor")
    else:
        yield became(source, "algo.tis.cap", source[cap], cap)
        if source[least] is not None:
            yield became(source, "algo.tis.lower", source[least], least)
