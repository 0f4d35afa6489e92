"""A whole run of a model with experts on two ranks with the embedded engine, and its resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dapo_mcore.replay.record import read_step
from tests.train.runs import metrics, python, rewind, run, stable

REPLAY = ("-m", "dapo_mcore.cli", "replay")
FINAL = "hf/final/model.safetensors"
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 16,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
}
SETTINGS = [
    "model.path=moe",
    "parallel.tensor_parallel=1",
    "parallel.expert_parallel=2",
    "model.moe_aux_loss_coef=0.01",
    "model.routing_replay=scoring",
    "num_rollout_steps=2",
    "warm_start=null",
    "eval.at_start=false",
    "eval.sets={}",
    "checkpoint.every=1",
    "observe.record=true",
]


@pytest.fixture
def with_experts(task: Path) -> Path:
    """The quickstart's task with a Qwen3-MoE model."""
    model = shutil.copytree(task / "runs/arithmetic/model", task / "moe")
    config = json.loads((model / "config.json").read_bytes()) | CONFIG
    (model / "config.json").write_text(json.dumps(config))
    return task


def test_a_model_with_experts_trains_and_resumes_bitwise(with_experts):
    run(with_experts, "experts", *SETTINGS, processes=2)
    folder = with_experts / "runs/experts"
    first, whole = metrics(with_experts, "experts"), (folder / FINAL).read_bytes()
    assert [row["step"] for row in first] == [1, 2]
    assert all(row["mismatch/logprob_diff_max"] < 1e-4 for row in first)
    assert all(row["updates_per_step"] > 1 and 1 < row["actor/moe_aux_loss"] < 1.5 for row in first)
    tensors = load_file(folder / FINAL)
    assert tensors["model.layers.1.mlp.experts.5.down_proj.weight"].shape == (64, 48)

    recorded = read_step(folder, 2)
    assert any(".experts." in name for name in recorded.updates[0].gradients)
    alone = python(with_experts, *REPLAY, "runs/experts", "2", "parallel.expert_parallel=1", merge=True)
    assert alone.returncode == 0 and "step 2: the same within rounding" in alone.stdout, alone.stdout

    rewind(folder, 1)
    output = run(with_experts, "experts", *SETTINGS, processes=2)
    assert "resumed after rollout step 1" in output
    assert [stable(row) for row in metrics(with_experts, "experts")] == [stable(row) for row in first]
    assert (folder / FINAL).read_bytes() == whole
    assert read_step(folder, 2) == recorded
