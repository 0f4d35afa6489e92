"""NeMo-RL's table as a whole, and a configuration in its style with the YAML that a person would write for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dapo_mcore.config.foreign_names import NEMO as NAMES
from dapo_mcore.config.keys import kind_of
from dapo_mcore.foreign.commands.import_run import imported
from dapo_mcore.foreign.tables.nemo import NEMO
from dapo_mcore.foreign.write import run_yaml
from tests.foreign.nemo_runs import imported as run_of

STILL_TO_COME = {
    "num_epochs", "data.chat_template_kwargs", "rollout.stop", "eval.top_k", "optimizer.warmup_rollout_steps", "optimizer.decay_rollout_steps",
    "checkpoint.keep_best", "checkpoint.best_metric", "checkpoint.best_mode", "observe.mlflow_experiment", "observe.swanlab_project",
}  # fmt: skip

RUN = """
defaults: ours.yaml
grpo: {num_prompts_per_step: 64, num_generations_per_prompt: 8, max_num_epochs: 2, normalize_rewards: false}
loss_fn: {reference_policy_kl_penalty: 0, ratio_clip_max: 0.25}
policy:
  model_name: org/tiny
  max_total_sequence_length: 3072
  train_global_batch_size: 128
  train_micro_batch_size: 2
  megatron_cfg: {enabled: true, tensor_model_parallel_size: 2, optimizer: {lr: 2.0e-6}, scheduler: {lr_warmup_iters: 5}}
  generation: {vllm_cfg: {tensor_parallel_size: 2}}
data: {max_input_seq_length: 1024, train: {data_path: /d/train.jsonl, input_key: question}, default: {prompt_file: null}}
env: {math: {math_verify_impl: dapo_math_verify}}
cluster: {gpus_per_node: 4}
"""
PARENT = """
grpo: {reward_scaling: {enabled: true, target_min: -1.0}}
checkpointing: {save_period: 25, keep_top_k: null}
"""

YAML = """
output_dir: results/grpo
seed: 42
num_epochs: 2
model: {path: org/tiny, dtype: bf16}
data: {files: [/d/train.jsonl], prompt_key: question, answer_key: output, chat_template: true, deduplicate: false, max_prompt_tokens: 1024, on_long_prompt: drop}
parallel: {tensor_parallel: 2, expert_tensor_parallel: 1}
rollout:
  group_size: 8
  max_response_tokens: 2048
  engine: sglang
  sglang: {tensor_parallel: 2, num_servers: 2, colocated: true, sync: tensor, server_args: {mem-fraction-static: 0.6}}
sampling: {train_batch_prompts: 64, style: none}
reward: {workers: 8}
algo: {clip_high: 0.25, advantage_std: none, advantage_baseline: leave-one-out}
batch: {mini_batch_prompts: 16, max_tokens: 6144, shuffle: false}
optimizer: {lr: "2e-6", weight_decay: 0.01, warmup_rollout_steps: 5}
checkpoint: {every: 25, keep: null}
observe: {tensorboard: false}
"""


# A number such as 2e-6 is text to PyYAML and a number to dapo_mcore.
def test_a_configuration_becomes_the_yaml_of_a_person(tmp_path: Path) -> None:
    (tmp_path / "ours.yaml").write_text(PARENT)
    (tmp_path / "run.yaml").write_text(RUN)
    conversion = imported("nemo", tmp_path / "run.yaml")
    assert conversion.losses == {}
    assert not conversion.asked
    found, expected = yaml.safe_load(run_yaml(conversion)), yaml.safe_load(YAML)
    assert {key: found.get(key) for key in {**found, **expected}} == {
        key: expected.get(key) for key in {**found, **expected}
    }


def test_a_key_that_the_table_does_not_know_is_a_loss() -> None:
    for key, changes in {
        "policy.megatron_cfg.new_switch": False,
        "policy.generation.new_penalty": True,
        "logger.new": False,
    }.items():
        conversion = run_of({key: 1})
        assert [setting.key for setting in conversion.unknown] == [key]
        assert conversion.losses[key] is changes


def test_settings_that_are_one_loss_have_one_name() -> None:
    conversion = run_of({"async_rl.sampler.name": "fifo", "async_rl.max_inflight_prompts": 8, "policy.quant_cfg": None})
    assert conversion.losses["async_rl.sampler.name"] is True
    assert conversion.unaccepted(["async_rl.sampler.name"]) == []
    assert (conversion.kind_of("async_rl.max_inflight_prompts"), conversion.kind_of("policy.quant_cfg")) == (
        "lost",
        "meaningless",
    )


def test_every_key_that_a_rule_sets_is_ours() -> None:
    ours = {key for rule in NEMO.rules for key in rule.ours}
    assert sorted(key for key in ours - STILL_TO_COME if kind_of(key.split(".")) is None) == []


@pytest.mark.parametrize("key", NAMES)
def test_each_name_of_the_list_is_in_a_rule_for_our_key(key: str) -> None:
    examples = (key, f"{key}.x", f"{key}.data_path")
    ours = {our for rule in NEMO.rules if any(rule.reads(example) for example in examples) for our in rule.ours}
    parts = {".".join(our.split(".")[:depth]) for our in ours for depth in range(1, 5)}
    assert set(NAMES[key].keys) & parts


def test_the_name_in_wandb_names_the_run() -> None:
    assert run_of({"logger.wandb.name": "llama8b"}).values()["name"][0] == "llama8b"


def test_keys_of_older_versions_are_lost_with_their_new_names() -> None:
    conversion = run_of({"data.prompt_file": "cot.txt", "data.dataset_name": "OpenMathInstruct-2"})
    assert conversion.unaccepted([]) == ["data.prompt_file", "data.dataset_name"]
