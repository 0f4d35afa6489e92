"""The section `critic`, and the rules that tie it to algo.advantage."""

from __future__ import annotations

from typing import Any

import pytest

from dapo_mcore.config.file import parse_config
from dapo_mcore.config.keys import nearest_keys
from dapo_mcore.errors import ConfigError

BASE: dict[str, Any] = {"model": {"path": "model"}, "data": {"files": ["data.parquet"]}}
COSINE = {"schedule": "cosine"}


def config(**sections: Any) -> Any:
    return parse_config(BASE | sections)


def test_ppo_needs_one_key():
    found = config(algo={"advantage": "gae"})
    assert (found.algo.gamma, found.algo.lam) == (1, 1)
    assert (found.critic.optimizer.lr, found.critic.clip, found.critic.warmup_steps) == (1e-5, 0.5, 0)


def test_another_key_of_the_critics_optimizer_leaves_its_learning_rate_as_it_is():
    found = config(algo={"advantage": "gae"}, critic={"optimizer": {"weight_decay": 0}})
    assert (found.critic.optimizer.lr, found.critic.optimizer.weight_decay) == (1e-5, 0)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"critic": {"warmup_steps": 3}}, "section critic: without effect with algo.advantage group; leave it out, or set algo"),
        ({"algo": {"lam": 0.95}}, "algo.lam 0.95: without effect with algo.advantage group"),
        ({"algo": {"advantage": "gae", "advantage_std": "none"}}, "algo.advantage_std none: without effect with algo.advantage gae"),
        ({"algo": {"advantage": "gae", "policy_loss": "gspo", "loss_mode": "seq-mean-token-mean"}}, "use policy_loss clip"),
        ({"algo": {"advantage": "gae"}, "critic": {"optimizer": COSINE}}, "needs critic.optimizer.decay_updates"),
        ({"algo": {"advantage": "gae"}, "critic": {"optimizer": {"min_lr": 1e-3}}}, "critic.optimizer.min_lr 0.001 is above"),
        (
            {"algo": {"advantage": "gae"}, "critic": {"warmup_steps": 100}},
            "critic.warmup_steps 100 leaves none of num_rollout_steps 100 to train the policy in; use at most 99",
        ),
        (
            {
                "algo": {"advantage": "gae"},
                "critic": {"optimizer": {"distributed": False}},
                "parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True},
            },
            "parallel.overlap_param_gather needs critic.optimizer.distributed true",
        ),
        (
            {
                "algo": {"advantage": "gae"},
                "critic": {"optimizer": {"exp_avg_dtype": "bf16"}},
                "model": {"path": "model", "dtype": "fp32"},
            },
            "critic.optimizer.offload_fraction and moments in bf16 are for models in bf16",
        ),
        ({"algo": {"advantage": "gae"}, "critic": {"clip": 0}}, "critic.clip is 0; set a finite number that is above 0, or null"),
    ],
)  # fmt: skip
def test_a_setting_that_would_do_nothing_or_harm_is_refused(sections, message):
    with pytest.raises(ConfigError) as error:
        config(**sections)
    assert message in str(error.value)


def test_only_a_path_that_names_the_critic_finds_the_keys_of_its_optimizer():
    assert nearest_keys(("ref", "critic", "optim", "clip_grad")) == ["critic.optimizer.clip_grad"]
    assert nearest_keys(("ref", "actor", "optim", "clip_grad")) == ["optimizer.clip_grad"]
    assert nearest_keys(("trainer", "critic_warmup")) == ["critic.warmup_steps"]
