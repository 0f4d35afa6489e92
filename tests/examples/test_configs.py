"""Every configuration in examples/ loads, and the reference one has the numbers of the public script."""

from __future__ import annotations

from pathlib import Path

import pytest

from dapo_mcore.config.file import load_config

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_is_valid(path):
    assert load_config(path).name == path.stem


def test_the_reference_configuration_has_the_numbers_of_the_public_script():
    c = load_config(EXAMPLES / "dapo_32b.yaml")
    assert (c.sampling.gen_batch_prompts, c.sampling.train_batch_prompts, c.rollout.group_size) == (1536, 512, 16)
    assert c.batch.mini_batch_prompts * c.rollout.group_size == 512
    assert c.sampling.train_batch_prompts // c.batch.mini_batch_prompts == 16
    assert (c.data.max_prompt_tokens, c.rollout.max_response_tokens, c.batch.max_tokens) == (2048, 20480, 22528)
    assert (c.algo.clip_low, c.algo.clip_high, c.algo.dual_clip, c.algo.loss_mode) == (0.2, 0.28, 10.0, "token-mean")
    assert (c.algo.kl.coef, c.algo.entropy_coef) == (0.0, 0.0)
    o = c.optimizer
    assert (o.lr, o.schedule, o.weight_decay, o.clip_grad, o.warmup_updates) == (1e-6, "constant", 0.1, 1.0, 10 * 16)
    assert (c.rollout.temperature, c.rollout.top_p, c.rollout.top_k) == (1.0, 1.0, -1)
    assert (c.eval.temperature, c.eval.top_p, c.eval.every, c.checkpoint.every) == (1.0, 0.7, 5, 5)
    overlong = c.reward.overlong
    assert (overlong.penalty, overlong.max_length, overlong.cache, overlong.factor) == (True, 20480, 4096, 1.0)
    p, s = c.parallel, c.rollout.sglang
    assert p.tensor_parallel * p.pipeline_parallel * p.context_parallel * p.data_parallel == 16 * 8
    assert s.num_servers * s.tensor_parallel == 16 * 8


def test_the_configuration_of_one_node_differs_from_the_reference_in_size_alone():
    large, small = load_config(EXAMPLES / "dapo_32b.yaml"), load_config(EXAMPLES / "dapo_7b.yaml")
    for section in ("algo", "reward", "data"):
        assert getattr(small, section) == getattr(large, section)
    p, s = small.parallel, small.rollout.sglang
    assert p.tensor_parallel * p.pipeline_parallel * p.context_parallel * p.data_parallel == 8
    assert s.num_servers * s.tensor_parallel == 8
    updates = small.sampling.train_batch_prompts // small.batch.mini_batch_prompts
    assert small.optimizer.warmup_updates == 10 * updates


def test_ppo_at_the_reference_size_differs_from_dapo_in_the_algorithm_alone():
    dapo, ppo = load_config(EXAMPLES / "dapo_32b.yaml"), load_config(EXAMPLES / "ppo_32b.yaml")
    for section in ("parallel", "data", "rollout", "batch", "optimizer", "eval", "checkpoint"):
        assert getattr(ppo, section) == getattr(dapo, section)
    assert ppo.sampling.train_batch_prompts == dapo.sampling.train_batch_prompts
    assert (ppo.algo.advantage, ppo.algo.gamma, ppo.algo.lam) == ("gae", 1.0, 1.0)
    assert (ppo.algo.clip_low, ppo.algo.clip_high, ppo.sampling.style) == (0.2, 0.2, "none")
    assert (ppo.critic.optimizer.lr, ppo.critic.clip, ppo.critic.warmup_steps) == (1e-5, 0.5, 20)


def test_the_configuration_with_tools_has_the_numbers_of_the_public_recipe():
    c = load_config(EXAMPLES / "retool.yaml")
    assert (c.sampling.train_batch_prompts, c.batch.mini_batch_prompts, c.rollout.group_size) == (512, 64, 16)
    assert (c.data.max_prompt_tokens, c.rollout.max_response_tokens, c.batch.max_tokens) == (2048, 16384, 18432)
    assert (c.algo.clip_low, c.algo.clip_high, c.algo.dual_clip, c.algo.kl.coef) == (0.2, 0.28, 10.0, 0.0)
    assert (c.sampling.style, c.reward.overlong.penalty, c.optimizer.lr) == ("none", False, 1e-6)
    assert (c.agent.max_turns, c.agent.call_format) == (8, "tool_call")
    assert (c.eval.samples_per_prompt, c.eval.top_p, c.eval.every, c.checkpoint.every) == (30, 0.6, 5, 30)
    (tool,) = c.tools
    assert (tool.function, tool.timeout_s, tool.sandbox.memory_mib, tool.max_output_characters) == (
        "python", 30, 1024, 256,
    )  # fmt: skip
    p, s = c.parallel, c.rollout.sglang
    assert p.tensor_parallel * p.pipeline_parallel * p.context_parallel * p.data_parallel == 2 * 8
    assert s.num_servers * s.tensor_parallel == 2 * 8
    assert c.eval.sets["aime25"].system_prompt == c.data.system_prompt
