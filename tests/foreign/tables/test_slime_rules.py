"""slime's flags in our words, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from tests.foreign.slime_runs import imported, ours


def losses(flags: dict[str, Any]) -> dict[str, bool]:
    return imported({"lr-decay-style": "constant", **flags}).losses


def test_length() -> None:
    assert ours({"num-epoch": 3})["num_rollout_steps"] == 5
    assert ours({"num-rollout": None, "num-epoch": 3})["num_epochs"] == 3
    assert list(imported({"num-rollout": None}).asked) == ["num_rollout_steps"]


def test_samples_become_prompts() -> None:
    assert ours({"n-samples-per-prompt": 8, "global-batch-size": 32})["batch.mini_batch_prompts"] == 4
    assert ours({"num-steps-per-rollout": 2})["batch.mini_batch_prompts"] == 4
    assert ours({})["batch.mini_batch_prompts"] == 8
    assert "batch.mini_batch_prompts" in imported({"n-samples-per-prompt": 8, "global-batch-size": 30}).asked


def test_tokens_hold_the_longest_sequence() -> None:
    flags = {"rollout-max-prompt-len": 200, "use-dynamic-batch-size": True, "context-parallel-size": 2}
    assert ours({**flags, "max-tokens-per-gpu": 4096})["batch.max_tokens"] == 4096
    assert ours({**flags, "max-tokens-per-gpu": 500})["batch.max_tokens"] == 600
    assert ours({"rollout-max-prompt-len": 200, "micro-batch-size": 3})["batch.max_tokens"] == 3600


def test_a_bound_that_is_unset_is_the_other() -> None:
    found = ours({"eps-clip": 0.1})
    assert (found["algo.clip_low"], found["algo.clip_high"], found["algo.dual_clip"]) == (0.1, 0.1, None)
    assert ours({"eps-clip-high": 0.28})["algo.clip_high"] == 0.28
    assert ours({})["algo.loss_mode"] == "seq-mean-token-mean"
    assert ours({"calculate-per-token-loss": True})["algo.loss_mode"] == "token-mean"


def test_a_coefficient_whose_switch_is_off_is_zero() -> None:
    assert ours({"kl-loss-coef": 0.1})["algo.kl.coef"] == 0
    on = ours({"kl-loss-coef": 0.1, "use-kl-loss": True})
    assert (on["algo.kl.coef"], on["algo.kl.place"], on["algo.kl.estimator"]) == (0.1, "loss", "k1")
    shaped = ours({"kl-coef": 0.2, "kl-loss-type": "low_var_kl"})
    assert (shaped["algo.kl.coef"], shaped["algo.kl.place"], shaped["algo.kl.estimator"]) == (0.2, "reward", "k3")
    assert losses({"kl-coef": 0.2, "kl-loss-coef": 0.1, "use-kl-loss": True}) == {"kl-coef": True}


def test_estimators() -> None:
    found = ours({"advantage-estimator": "gspo"})
    assert (found["algo.advantage"], found["algo.policy_loss"], found["algo.advantage_std"]) == (
        "group",
        "gspo",
        "unbiased",
    )
    assert ours({"disable-grpo-std-normalization": True})["algo.advantage_std"] == "none"
    critic = ours({"advantage-estimator": "ppo", "lambd": 0.9, "value-clip": 0.3})
    assert (critic["algo.advantage"], critic["algo.lam"], critic["critic.clip"]) == ("gae", 0.9, 0.3)
    lost = imported({"advantage-estimator": "reinforce_plus_plus"})
    assert lost.unaccepted([]) == ["advantage-estimator"]
    assert "algo.advantage" not in lost.values()


@pytest.mark.parametrize(
    "flag",
    ["use-opsm", "use-opd", "use-unbiased-kl", "disable-rewards-normalization", "custom-loss-function-path", "custom-generate-function-path",
     "normalize-advantages"],
)  # fmt: skip
def test_what_changes_the_objective_is_a_loss_of_it(flag: str) -> None:
    assert losses({flag: True}) == {flag: True}


def test_filters() -> None:
    assert ours({})["sampling.style"] == "none"
    path = "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"
    found = ours({"dynamic-sampling-filter-path": path, "over-sampling-batch-size": 16})
    assert (found["sampling.style"], found["sampling.gen_batch_prompts"], found["sampling.carry_surplus"]) == (
        "filter",
        16,
        False,
    )
    assert losses({"dynamic-sampling-filter-path": "mine.keep"}) == {"dynamic-sampling-filter-path": True}


def test_rewards_are_never_exchanged_in_silence() -> None:
    assert ours({"rm-type": "dapo"})["reward.function"] == "math_dapo"
    assert list(imported({"rm-type": "deepscaler"}).asked) == ["reward.function"]
    assert losses({"rm-type": "gpqa"}) == {"rm-type": True}
    assert losses({"custom-rm-path": "x.score"}) == {"custom-rm-path": True}


def test_servers() -> None:
    flags = {"actor-num-nodes": 2, "actor-num-gpus-per-node": 8, "rollout-num-gpus-per-engine": 4}
    found = ours(flags)
    assert (found["rollout.sglang.num_servers"], found["rollout.sglang.tensor_parallel"]) == (4, 4)
    assert (found["rollout.sglang.sync"], found["rollout.sglang.placement"]) == ("tensor", "nodes")
    apart = ours({**flags, "colocate": None, "rollout-num-gpus": 8})
    assert (apart["rollout.sglang.num_servers"], apart["rollout.sglang.sync"]) == (2, "distributed")
    assert set(imported({**flags, "rollout-num-gpus-per-engine": 16}).asked) == {
        "rollout.sglang.tensor_parallel", "rollout.sglang.num_servers",
    }  # fmt: skip
    ahead = imported({"colocate": None}, "train_async.py")
    assert ahead.values()["rollout.async_steps"][0] == 1
    assert list(ahead.asked) == ["algo.tis.mode"]


def test_schedule() -> None:
    found = ours({"lr-decay-style": "cosine", "lr-warmup-iters": 7, "lr-decay-iters": 90, "min-lr": 1e-7})
    assert (found["optimizer.warmup_updates"], found["optimizer.decay_updates"], found["optimizer.min_lr"]) == (
        7,
        90,
        1e-7,
    )


def test_evaluation() -> None:
    flags = {
        "eval-prompt-data": ["aime", "/a.jsonl", "math", "/b.jsonl"],
        "eval-interval": 5,
        "rollout-temperature": 0.8,
        "label-key": "y",
    }
    found = ours({**flags, "eval-max-response-len": 4096, "n-samples-per-eval-prompt": 4})
    assert found["eval.sets.aime.files"] == ["/a.jsonl"]
    assert found["eval.sets.math.answer_key"] == "y"
    assert (found["eval.temperature"], found["eval.samples_per_prompt"], found["eval.max_response_tokens"]) == (
        0.8,
        4,
        4096,
    )
    assert (found["eval.every"], found["eval.at_start"]) == (5, True)
    assert "eval.every" not in ours({"eval-prompt-data": ["aime", "/a.jsonl"]})


def test_servers_options_and_stops() -> None:
    found = ours(
        {
            "sglang-mem-fraction-static": 0.7,
            "sglang-cuda-graph-bs": [1, 2],
            "rollout-stop": ["x"],
            "rollout-stop-token-ids": [7],
        }
    )
    assert found["rollout.sglang.server_args"] == {"mem-fraction-static": 0.7, "cuda-graph-bs": [1, 2]}
    assert found["rollout.stop"] == ["x", 7]


def test_megatrons_own_default_schedule_is_told() -> None:
    assert imported({}).losses == {"lr-decay-style": False}
