"""slime's table as a whole, and a script in its style with the YAML that a person would write for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dapo_mcore.config.foreign_names import SLIME as NAMES
from dapo_mcore.config.keys import kind_of
from dapo_mcore.foreign.commands.import_run import imported
from dapo_mcore.foreign.tables.slime import SLIME
from dapo_mcore.foreign.write import run_yaml
from tests.foreign.slime_runs import imported as run_of

STILL_TO_COME = {"num_epochs", "data.chat_template_kwargs", "rollout.stop"}

SCRIPT = """#!/bin/bash
GPUS=${GPUS:-4}
HERE=$(cd "$(dirname "$0")" && pwd)
source "$HERE/tiny.sh"
LEARN=(
   --advantage-estimator gspo   # sequences
   --eps-clip 3e-4
   --eps-clip-high 4e-4
   --kl-loss-coef 0.01
   --use-tis
)
ray job submit -- python3 train.py --actor-num-gpus-per-node $GPUS --colocate ${MODEL_ARGS[@]} \\
   --hf-checkpoint $HOME/tiny --load /r/saved --save /r/saved --save-interval 50 \\
   --prompt-data /d/train.jsonl --input-key question --label-key answer --apply-chat-template --rollout-shuffle \\
   --rm-type dapo --num-rollout $((50 * 4)) --rollout-batch-size 64 --n-samples-per-prompt 8 --global-batch-size 128 \\
   --rollout-max-response-len 3072 --rollout-max-prompt-len 1024 --rollout-temperature 1 --use-dynamic-batch-size \\
   --max-tokens-per-gpu 8192 --lr 2e-6 --lr-decay-style constant --weight-decay 0.1 --adam-beta2 0.98 \\
   --rollout-num-gpus-per-engine 2 --sglang-mem-fraction-static 0.6 ${LEARN[@]}
"""

YAML = """
output_dir: /r/saved
seed: 42
num_rollout_steps: 200
model: {path: '~/tiny', dtype: bf16}
data:
  files: [/d/train.jsonl]
  prompt_key: question
  answer_key: answer
  chat_template: true
  deduplicate: false
  max_prompt_tokens: 1024
  on_long_prompt: drop
rollout:
  group_size: 8
  max_response_tokens: 3072
  engine: sglang
  sglang: {tensor_parallel: 2, num_servers: 2, colocated: true, sync: tensor, server_args: {mem-fraction-static: 0.6}}
sampling: {train_batch_prompts: 64, style: none}
algo: {policy_loss: gspo, clip_low: 3.0e-4, clip_high: 4.0e-4, loss_mode: seq-mean-token-mean, tis: {mode: truncate}}
batch: {mini_batch_prompts: 16, max_tokens: 8192, shuffle: false}
optimizer: {lr: "2e-6", warmup_updates: 0, beta2: 0.98}
checkpoint: {every: 50, keep: null}
observe: {tensorboard: false}
"""


# A number such as 2e-6 is text to PyYAML and a number to dapo_mcore.
def test_a_script_becomes_the_yaml_of_a_person(tmp_path: Path) -> None:
    (tmp_path / "tiny.sh").write_text(
        "MODEL_ARGS=(\n  --num-layers 2 --swiglu --attention-dropout 0 --hidden-dropout 0\n)"
    )
    (tmp_path / "run.sh").write_text(SCRIPT)
    conversion = imported("slime", tmp_path / "run.sh")
    found = yaml.safe_load(run_yaml(conversion))
    assert found == yaml.safe_load(YAML)
    assert conversion.unaccepted([]) == []
    assert conversion.losses == {}


def test_every_key_that_a_rule_sets_is_ours() -> None:
    ours = {key for rule in SLIME.rules for key in rule.ours}
    assert sorted(key for key in ours - STILL_TO_COME if kind_of(key.split(".")) is None) == []


@pytest.mark.parametrize("key", NAMES)
def test_each_name_of_the_list_is_in_a_rule_for_our_key(key: str) -> None:
    ours = {our for rule in SLIME.rules if rule.reads(key) for our in rule.ours}
    parts = {".".join(our.split(".")[:depth]) for our in ours for depth in range(1, 5)}
    parts |= {"batch.mini_batch_samples"} if key == "global-batch-size" else set()
    assert set(NAMES[key].keys) & parts


@pytest.mark.parametrize(
    ("flag", "on", "off"),
    [("moe-aux-loss-coeff", 0.01, 0), ("update-weights-interval", 2, 1), ("rollout-top-p", 0.9, 1.0)],
)
def test_flags_that_change_nothing_only_at_one_value(flag: str, on: float, off: float) -> None:
    assert run_of({flag: on}).losses.get(flag) is True
    assert flag not in run_of({flag: off}).losses and run_of({flag: off}).kind_of(flag) in ("meaningless", "same")


def test_the_bias_of_routers_moves_by_default_where_there_is_one() -> None:
    bias = {"moe-router-enable-expert-bias": True}
    assert run_of(bias).losses["moe-router-bias-update-rate"] is True
    for still in ({**bias, "moe-router-bias-update-rate": 0}, {"moe-router-bias-update-rate": 0.001}):
        assert "moe-router-bias-update-rate" not in run_of(still).losses


def test_files_of_further_flags_are_a_loss_of_the_objective() -> None:
    for flag in ("custom-config-path", "megatron-config-path"):
        assert run_of({flag: "more.yaml"}).losses[flag] is True


def test_images_are_lost() -> None:
    assert run_of({"multimodal-keys": {"image": "images"}}).losses["multimodal-keys"] is True


def test_the_group_of_wandb_names_the_run_and_what_slime_always_does_is_no_setting() -> None:
    conversion = run_of({"wandb-group": "qwen3 4B"})
    assert conversion.values()["name"][0] == "qwen3-4B"
    (always,) = [outcome for outcome in conversion.outcomes if outcome.ours == "data.deduplicate"]
    assert always.sources == () and not conversion.is_given(always)
