"""Settings without effect are named, with the reason; those that matter are not."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from dapo_mcore.config.effect import IDLE, doubtful, without_effect
from dapo_mcore.config.file import load_config, parse_config
from dapo_mcore.errors import ConfigError

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
SERVED = {"engine": "sglang"}
SET = {"aime": {"files": ["a.jsonl"]}}


def config(**sections: Any) -> Any:
    tree = {"model": {"path": "m", "dtype": "bf16"}, "data": {"files": ["t.jsonl"]}, "eval": {"sets": SET}}
    return parse_config({**tree, **sections})


CASES = {
    "rollout.sglang.num_servers 4, rollout.sglang.sync tensor (rollout.engine is embedded)": {
        "rollout": {"sglang": {"num_servers": 4, "sync": "tensor"}}
    },
    "rollout.max_batch 7 (rollout.engine is sglang)": {"rollout": {**SERVED, "max_batch": 7}},
    "rollout.sglang.base_port 30000 (the servers at urls run already)": {
        "rollout": {**SERVED, "sglang": {"urls": ["http://a:1"], "base_port": 30000}}
    },
    "rollout.sglang.senders 2 (sync is not distributed)": {"rollout": {**SERVED, "sglang": {"senders": 2}}},
    "rollout.sglang.sync_dir /tmp (sync is not disk)": {
        "rollout": {**SERVED, "sglang": {"sync_dir": "/tmp", "sync": "tensor"}}
    },
    "sampling.gen_batch_prompts 600 (sampling.style is not filter)": {
        "sampling": {"style": "none", "gen_batch_prompts": 600}
    },
    "sampling.resample_size 2 (sampling.style is not resample)": {"sampling": {"resample_size": 2}},
    "sampling.max_gen_batches 3 (sampling.style none keeps every group)": {
        "sampling": {"style": "none", "max_gen_batches": 3}
    },
    "sampling.carry_surplus false (sampling.style none has no surplus)": {
        "sampling": {"style": "none", "carry_surplus": False}
    },
    "ray.address a:1 (nothing has placement ray)": {"ray": {"address": "a:1"}},
    "reward.overlong.cache 9, reward.overlong.factor 0.5 (reward.overlong.penalty is false)": {
        "reward": {"overlong": {"cache": 9, "factor": 0.5}}
    },
    "reward.failure_value 0.0 (reward.on_failure is mask)": {"reward": {"failure_value": 0}},
    "reward.timeout_seconds 5.0 (there are no reward.workers)": {"reward": {"timeout_seconds": 5}},
    "reward.adapter trl (no reward function is imported)": {"reward": {"adapter": "trl"}},
    "algo.kl.estimator k1 (algo.kl.coef is 0)": {"algo": {"kl": {"estimator": "k1"}}},
    "algo.tis.lower 0.5, algo.tis.cap 5.0 (algo.tis.mode is off)": {"algo": {"tis": {"lower": 0.5, "cap": 5}}},
    "algo.rejection_divisor all (algo.rejection is empty)": {"algo": {"rejection_divisor": "all"}},
    "algo.loss_length 9 (algo.loss_mode is not seq-mean-token-sum-norm)": {"algo": {"loss_length": 9}},
    "optimizer.min_lr 1e-07, optimizer.decay_updates 50 (its schedule is constant)": {
        "optimizer": {"min_lr": 1e-7, "decay_updates": 50}
    },
    "critic.optimizer.decay_updates 32 (its schedule is constant)": {
        "algo": {"advantage": "gae"},
        "critic": {"optimizer": {"decay_rollout_steps": 2}},
    },
    "optimizer.spike_window 9 (optimizer.spike_factor is null)": {"optimizer": {"spike_window": 9}},
    "checkpoint.keep 9 (nothing is saved)": {"checkpoint": {"at_end": False, "keep": 9}},
    "checkpoint.keep_best 1, checkpoint.best_metric reward/mean (nothing is saved)": {
        "checkpoint": {"at_end": False, "keep_best": 1, "best_metric": "reward/mean"}
    },
    "checkpoint.best_mode min (checkpoint.keep_best is 0)": {"checkpoint": {"best_mode": "min"}},
    "eval.every 9 (eval.sets is empty)": {"eval": {"every": 9}},
    "observe.eval_samples_per_set 9 (eval.sets is empty)": {"eval": {}, "observe": {"eval_samples_per_set": 9}},
    "sampling.max_staleness 3 (no group is left for a later step)": {"sampling": {"style": "none", "max_staleness": 3}},
    "eval.temperature 0.6 (every set has its own)": {
        "eval": {"temperature": 0.6, "sets": {"aime": {"files": ["a.jsonl"], "temperature": 1.0}}}
    },
    "eval.sets.aime.top_k 5, eval.top_p 0.7 (temperature 0 is greedy)": {
        "eval": {"temperature": 0, "top_p": 0.7, "sets": {"aime": {"files": ["a.jsonl"], "top_k": 5}}}
    },
    "eval.sets.aime.shuffle false (evaluation takes all prompts in the order of the file)": {
        "eval": {"sets": {"aime": {"files": ["a.jsonl"], "shuffle": False}}}
    },
    "warm_start.stop_at 0.5 (warm_start.choose is null)": {"warm_start": {"files": ["d.jsonl"], "stop_at": 0.5}},
}


@pytest.mark.parametrize("told", CASES)
def test_a_setting_without_effect_is_named_with_its_reason(told):
    assert without_effect(config(**CASES[told])) == [f"no effect: {told}"]


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"rollout": {**SERVED, "sglang": {"senders": 2, "sync": "distributed", "server_args": {"x": 1}}}},
        {"reward": {"overlong": {"penalty": True, "cache": 9}, "on_failure": "value", "failure_value": 0.0}},
        {"algo": {"kl": {"coef": 0.1, "estimator": "k1"}, "tis": {"mode": "truncate", "cap": 5}}},
        {"optimizer": {"schedule": "cosine", "decay_updates": 50, "min_lr": 1e-7}},
        {"sampling": {"style": "resample", "resample_size": 2}},
        {
            "reward": {"timeout_seconds": 5, "adapter": "trl"},
            "eval": {"sets": {"aime": {"files": ["a.jsonl"], "reward_function": "f.py:f"}}},
        },
        {
            "eval": {
                **{"temperature": 0, "top_p": 0.7, "top_k": 5},
                "sets": {"aime": {"files": ["a.jsonl"]}, "hot": {"files": ["a.jsonl"], "temperature": 1.0}},
            }
        },
        {"reward": {"function": "f.py:f", "timeout_seconds": 5, "adapter": "trl"}},
    ],
)
def test_settings_that_matter_are_not_named(sections):
    assert without_effect(config(**sections)) == []


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_no_example_has_a_setting_without_effect(example):
    assert without_effect(load_config(example)) == []


def test_every_key_of_the_table_exists():
    for idle in IDLE:
        made = config(warm_start={"files": ["d.jsonl"]})
        section = reduce(getattr, idle.section.split("."), made)
        assert {*idle.keys} <= {*type(section).model_fields}, idle


def test_servers_wider_than_a_node_are_doubted():
    wide = {"rollout": {**SERVED, "sglang": {"tensor_parallel": 16}}}
    assert doubtful(config(**wide)) == [
        "warning: rollout.sglang.tensor_parallel 16: a server runs on one node, and most nodes have 8 GPUs; use at most as many, and "
        "more servers"
    ]
    assert doubtful(config(rollout={**SERVED, "sglang": {"tensor_parallel": 8}})) == doubtful(config()) == []


def test_a_warm_up_longer_than_the_run_is_doubted():
    def made(steps: int) -> Any:
        return config(num_rollout_steps=3, optimizer={"warmup_rollout_steps": steps})

    assert doubtful(made(13)) == [
        "warning: the warm-up of optimizer lasts 13 rollout steps, and the run has 3: its learning rate never reaches 1e-06; shorten it, "
        "or train longer"
    ]
    assert doubtful(made(3)) == doubtful(config(num_rollout_steps=3)) == []


def test_best_checkpoints_that_are_seldom_evaluated_are_doubted():
    def made(evaluate: int | None, metric: str = "val/aime/mean@8") -> Any:
        best = {"every": 6, "keep_best": 1, "best_metric": metric}
        return config(eval={"every": evaluate, "sets": SET}, checkpoint=best)

    assert doubtful(made(4)) == [
        "warning: checkpoint.best_metric val/aime/mean@8 is known every 4 rollout steps (eval.every), and checkpoint.every is 6: only "
        "the last checkpoint and those of each 12 steps can be the best; let eval.every divide checkpoint.every"
    ]
    assert "eval.every is null): only the last checkpoint" in doubtful(made(None))[0]
    assert doubtful(made(3)) == doubtful(made(4, "reward/mean")) == []


def test_servers_in_fp8_need_a_model_in_bf16():
    fp8 = {**SERVED, "sglang": {"quantize": "fp8"}}
    with pytest.raises(ConfigError, match=r"quantize fp8 needs model.dtype bf16, but it is fp32.*or quantize none"):
        config(model={"path": "m"}, rollout=fp8)
    assert config(rollout=fp8).rollout.sglang.quantize == "fp8"


def test_advice_about_colocated_servers_on_ray_leads_to_a_way_that_works():
    """tensor → disk, and distributed → disk, never back to one of them."""

    def made(sync: str) -> Any:
        sglang = {"placement": "ray", "host": "node", "colocated": True, "sync": sync, "sync_dir": "/shared"}
        return config(rollout={**SERVED, "sglang": sglang}, ray={"address": "a:1"})

    with pytest.raises(ConfigError, match=r"sync tensor .* or sync disk with a sync_dir that all nodes share"):
        made("tensor")
    with pytest.raises(
        ConfigError, match=r"sync distributed does not go with colocated.*sync by disk, with a sync_dir"
    ):
        made("distributed")
    assert made("disk").rollout.sglang.colocated
