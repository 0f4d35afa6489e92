"""Rules of slime's table about the objective: sampling, rewards, advantages, the policy loss, KL and corrections.

Change here: how flags of slime that together say what is optimised become ours. Nothing unknown may become GRPO.
"""

from __future__ import annotations

from collections.abc import Iterator

from dapo_mcore.foreign.table import Outcome, Source, asked, became, gone
from dapo_mcore.foreign.tables import slime_mis

NO_LIMIT = 1_000_000
"""As good as none: the most that a count may be."""
_LOSSES = {"grpo": "clip", "gspo": "gspo", "cispo": "cispo", "ppo": "clip"}
_FILTER = "check_reward_nonzero_std"
_WITHOUT_SHAPING = ("grpo", "gspo", "cispo")
_KL = {"k1": "k1", "k2": "k2", "k3": "k3", "low_var_kl": "k3"}


def reward(source: Source) -> Iterator[Outcome]:
    """Yield the reward function. Rules whose parser is not here are asked for, never exchanged in silence."""
    path, kind = source.path("custom-rm-path"), source["rm-type"]
    if path is not None:
        yield gone(
            f"{path} scores a sample of slime's, asynchronously; nearest: reward.function path.py:name, which gets text and answer",
            "custom-rm-path", objective=True,
        )  # fmt: skip
        yield asked("reward.function", f"a function of yours, path.py:name, in place of {path}", "custom-rm-path")
    elif kind == "dapo":
        yield from _dapo(source)
    elif kind in ("deepscaler", "math", "boxed_deepscaler"):
        yield asked(
            "reward.function",
            f"slime's {kind} compares the last box as values{' after </think>' if kind == 'deepscaler' else ''}, for 1 or 0: math_verify "
            "compares values, too; math_boxed compares text",
            "rm-type",
        )  # fmt: skip
    elif kind == "boxed_dapo":
        note = "slime's boxed_dapo looks for `Answer:` inside the last box, where nobody writes it: math_dapo reads the text, math_boxed the box"
        yield asked("reward.function", note, "rm-type")
    elif kind is not None:
        yield gone(
            f"there is no rule {kind} here; nearest: a function of yours, path.py:name", "rm-type", objective=True
        )
        yield asked("reward.function", f"a function of yours, path.py:name, in place of {kind}", "rm-type")
    else:
        note = "the script names no rule: slime then takes each row's metadata.rm_type, or what code of its own gives"
        yield asked("reward.function", note, "rm-type")
    if source["reward-key"] is not None and kind != "dapo":
        yield gone("one number of several of a reward; nearest: a function of yours", "reward-key", objective=True)


def _dapo(source: Source) -> Iterator[Outcome]:
    """Yield the paper's rule. It gives a score of ±1 and whether the answer is right; reward-key says which is the reward."""
    key = source["reward-key"]
    if key in (None, "score"):
        used = ("rm-type", "reward-key") if key else ("rm-type",)
        yield Outcome("converted", used, "reward.function", "math_dapo", "the paper's rule, ±1")
    else:
        yield asked(
            "reward.function",
            f"slime trains on its {key}, which is 1 or 0; math_dapo is the same rule with ±1",
            "reward-key",
        )


def estimator(source: Source) -> Iterator[Outcome]:
    """Yield algo.advantage and algo.policy_loss, which one flag names in slime."""
    key, no_std = "advantage-estimator", "disable-grpo-std-normalization"
    name = source[key]
    if name not in _LOSSES:
        yield gone(
            f"there is no estimator {name} here, and none is put in its place; nearest: grpo", key, objective=True
        )
        return
    yield became(
        source, "algo.policy_loss", _LOSSES[name], key, note="PPO's clipped loss" if _LOSSES[name] == "clip" else ""
    )
    if name == "ppo":
        yield from _critic(source)
        return
    yield became(source, "algo.advantage", "group", key, note="a response against the others to its prompt")
    std = "none" if source[no_std] else "unbiased"
    yield became(source, "algo.advantage_std", std, no_std, note="Dr. GRPO" if std == "none" else "divisor n - 1")
    if source["normalize-advantages"]:
        yield gone(
            "advantages are not whitened over the step; nearest: advantage_std batch",
            "normalize-advantages",
            objective=True,
        )


def _critic(source: Source) -> Iterator[Outcome]:
    """Yield PPO's advantages. slime's critic has the policy's optimizer."""
    yield became(source, "algo.advantage", "gae", "advantage-estimator")
    yield became(source, "algo.gamma", source["gamma"], "gamma")
    yield became(source, "algo.lam", source["lambd"], "lambd")
    yield became(source, "critic.clip", source["value-clip"], "value-clip")
    yield became(source, "critic.warmup_steps", source["num-critic-only-steps"], "num-critic-only-steps")
    for flag, name in {
        "lr": "lr",
        "weight-decay": "weight_decay",
        "adam-beta1": "beta1",
        "adam-beta2": "beta2",
    }.items():
        yield became(source, f"critic.optimizer.{name}", source[flag], flag, note="the policy's")
    if source["normalize-advantages"]:
        yield Outcome("meaningless", ("normalize-advantages",), note="advantages of a critic are whitened here, too")
    else:
        yield gone(
            "slime leaves a critic's advantages as they are; here they are whitened over the step",
            "normalize-advantages", objective=True,
        )  # fmt: skip


def clip(source: Source) -> Iterator[Outcome]:
    """Yield the clip bounds: the upper one is the lower one's unless it is set."""
    high = "eps-clip-high" if source["eps-clip-high"] is not None else "eps-clip"
    yield became(source, "algo.clip_low", source["eps-clip"], "eps-clip")
    yield became(
        source, "algo.clip_high", source[high], high, note="" if high == "eps-clip-high" else "unset: as eps-clip"
    )
    yield became(source, "algo.dual_clip", source["eps-clip-c"], "eps-clip-c")
    token = "calculate-per-token-loss"
    mode = "token-mean" if source[token] else "seq-mean-token-mean"
    yield became(
        source,
        "algo.loss_mode",
        mode,
        token,
        note="over tokens" if source[token] else f"over responses: {token} is unset",
    )


def kl(source: Source) -> Iterator[Outcome]:
    """Yield the KL penalty. A coefficient whose switch is off becomes 0."""
    switch, coef, shaping = "use-kl-loss", "kl-loss-coef", "kl-coef"
    if source[shaping] and source["advantage-estimator"] in _WITHOUT_SHAPING:
        yield Outcome("meaningless", (shaping,), note="slime's group advantages take no KL from rewards: only a metric")
    elif source[switch] and source[shaping]:
        yield gone(
            "a KL in the reward and one in the loss together; here there is one of them", shaping, objective=True
        )
    if source[switch]:
        yield became(source, "algo.kl.coef", source[coef], coef)
        if source[coef]:
            yield became(source, "algo.kl.place", "loss", switch, note="the switch is on")
            yield _estimator(source)
        else:
            yield Outcome("meaningless", (switch, "kl-loss-type"), note="the coefficient is 0: only a metric")
    elif source[shaping] and source["advantage-estimator"] not in _WITHOUT_SHAPING:
        yield became(source, "algo.kl.coef", source[shaping], shaping)
        yield became(source, "algo.kl.place", "reward", shaping, note="reward shaping")
        yield _estimator(source)
    else:
        yield Outcome("converted", (coef, switch), "algo.kl.coef", 0.0, "use-kl-loss is off")


def _estimator(source: Source) -> Outcome:
    kind = source["kl-loss-type"]
    note = "cut at 10 nats here, and not there" if kind == "k3" else ""
    return became(source, "algo.kl.estimator", _KL[kind], "kl-loss-type", note=note)


def correction(source: Source) -> Iterator[Outcome]:
    """Yield importance weights against the engine's mismatch, and old log-probs of the engine."""
    own = "custom-tis-function-path"
    if source["use-tis"] and source[own] is None:
        yield Outcome("converted", ("use-tis",), "algo.tis.mode", "truncate", "truncated importance weights")
        yield became(source, "algo.tis.lower", source["tis-clip-low"] or None, "tis-clip-low")
        yield became(source, "algo.tis.cap", source["tis-clip"], "tis-clip")
    elif source["use-tis"] and str(source[own]).endswith("loss.icepop_function"):
        yield Outcome("converted", (own, "use-tis"), "algo.tis.mode", "icepop", "weights outside the bounds are 0")
        yield became(source, "algo.tis.lower", source["tis-clip-low"], "tis-clip-low")
        yield became(source, "algo.tis.cap", source["tis-clip"], "tis-clip")
    elif source["use-tis"] and str(source[own]).endswith(slime_mis.FUNCTION) and source["tis-mode"] is not None:
        yield from slime_mis.correction(source, own)
    elif source["use-tis"]:
        yield gone("a correction of your own; nearest: algo.tis, algo.rejection", own, objective=True)
        yield asked("algo.tis.mode", "the weights in its place: off, truncate, mask or icepop", own, "use-tis")
    if source["use-rollout-logprobs"]:
        yield became(source, "algo.old_logprobs", "rollout", "use-rollout-logprobs", note="those of the engine")
    ahead = source.run.entry == "train_async.py"
    older = ahead or (source["partial-rollout"] and not source["colocate"])
    if older and not source["use-tis"] and not source["use-rollout-logprobs"]:
        note = "samples are one version older, and the script does not correct for it: truncate (cap 2), or mask"
        yield asked("algo.tis.mode", note, "use-tis")
    if source["keep-old-actor"] and ahead:
        what = "old log-probs by a copy of the policy that generated; nearest: algo.old_logprobs rollout"
        yield gone(what, "keep-old-actor", objective=True)


def sampling(source: Source) -> Iterator[Outcome]:
    """Yield dynamic sampling: off without a filter."""
    key, more = "dynamic-sampling-filter-path", "over-sampling-batch-size"
    path = source[key]
    own = path is not None and not str(path).endswith(_FILTER)
    if own:
        yield gone(
            f"the filter {path}; nearest: sampling.style filter, by whether the answers' acc varies",
            key,
            objective=True,
        )
    on = path is not None and not own
    yield Outcome(
        "converted",
        (key,),
        "sampling.style",
        "filter" if on else "none",
        "by whether acc varies" if on else "no filter",
    )
    if on:
        batch = source[more] or source["rollout-batch-size"]
        yield became(
            source, "sampling.gen_batch_prompts", batch, more if source[more] else "rollout-batch-size", note="prompts"
        )
        yield Outcome("converted", (key,), "sampling.max_gen_batches", NO_LIMIT, "no limit")
        if not source["partial-rollout"]:
            note = "slime ends what is left and throws it away; here it is waited for: sampling.on_full abort is faster"
            yield Outcome("converted", (key,), "sampling.carry_surplus", False, note)
    elif source[more] and source[more] != source["rollout-batch-size"]:
        what = "more prompts than are trained on, of which the first to end are taken; here a step generates for its own prompts"
        yield gone(what, more)
    yield from _unfinished(source)


def _unfinished(source: Source) -> Iterator[Outcome]:
    """Yield what becomes of groups in flight once a step has enough: slime ends them, and with partial-rollout goes on later."""
    partial = "partial-rollout"
    if source[partial] and source["colocate"]:
        yield gone(
            "colocated servers keep no unfinished response for the next step; nearest: sampling.on_full abort", partial
        )
    elif source[partial]:
        yield Outcome("converted", (partial,), "sampling.on_full", "keep", "they go on under the next weights")
        yield Outcome("converted", (partial,), "sampling.carry_surplus", True, "kept for the next step")
        if source.run.entry == "train_async.py":
            yield Outcome(
                "converted", (partial,), "sampling.max_staleness", 2, "one step ahead, and one more in flight"
            )


def top_p(source: Source) -> Iterator[Outcome]:
    """Yield what a nucleus changes in the loss: slime's log-probs are within it."""
    if source["rollout-top-p"] not in (None, 1):
        what = "slime's log-probs are those within the nucleus that was drawn from; here they are those of all tokens; nearest: top_p 1"
        yield gone(what, "rollout-top-p", objective=True)


def router_bias(source: Source) -> Iterator[Outcome]:
    """Yield the bias by which Megatron balances experts, if the model has one: it moves after each gradient step."""
    rate, switch = "moe-router-bias-update-rate", "moe-router-enable-expert-bias"
    if source[switch] and source[rate]:
        yield gone("the bias of routers stays as it is", rate, objective=True)
    for key in (rate, switch):
        if source.gives(key):
            yield Outcome("meaningless", (key,), note="the bias stays as it is, as here")
