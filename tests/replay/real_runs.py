"""Real runs of a tiny model that differ by one planted change each, on the quickstart's task."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dapo_mcore.config.file import load_config
from dapo_mcore.model_files.hf_config import load_hf_config
from dapo_mcore.model_files.hf_folder import RandomReader
from tests.train.runs import QUICKSTART, ROOT, SMALL, environment, torchrun

# a policy that knows nothing is always wrong, so this reward has right and wrong answers without it
REWARD = """
import os

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    right = sum(map(ord, solution_str)) % 2 == 0
    score = 1.0 if right else -1.0
    return {"score": 0.5 if solution_str == os.environ.get("PLANTED") else score, "acc": right}
"""
# one process, since importing takes longer than a run. The run `reward` changes the score of a response of step 2 of `base`
PROGRAM = """
import json, os, sys
from pathlib import Path
from dapo_mcore.train.__main__ import main

for name, *overrides in json.loads(os.environ["CASES"]):
    if name == "reward":
        os.environ["PLANTED"] = json.loads(Path("runs/base/samples/step_000002.jsonl").read_text().splitlines()[0])["response"]
    assert main([*sys.argv[1:], f"name={name}", *overrides]) == 0
"""
ALIKE = [
    *SMALL,
    "warm_start=null",
    "model.init=pretrained",
    "reward.function=reward.py:compute_score",
    "reward.workers=1",
    "num_rollout_steps=2",
    "eval.sets={}",
    "checkpoint.export_at_end=false",
    "observe.tensorboard=false",
    "observe.plot_at_end=false",
    "observe.record=true",
]
TENSOR, INDEX = "model.layers.1.mlp.down_proj.weight", (5, 7)


def make_models(folder: Path) -> None:
    """Write the quickstart's data, its model with weights, and the same with the lowest bit of one element changed."""
    command = [sys.executable, str(ROOT / "examples/arithmetic.py"), "--out", "runs/arithmetic"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    model = load_config(QUICKSTART, [f"model.path={folder}/runs/arithmetic/model"]).model
    state = {name: tensor.contiguous().clone() for name, tensor in RandomReader(load_hf_config(model), 0).state.items()}
    for name in ("model", "bit"):
        shutil.copytree(model.path, folder / name)
        save_file(state, folder / name / "model.safetensors", {"format": "pt"})
        state[TENSOR].view(torch.int32)[INDEX] ^= 1


def values_of_the_bit(folder: Path) -> list[float]:
    return [load_file(folder / name / "model.safetensors")[TENSOR][INDEX].item() for name in ("model", "bit")]


def train(folder: Path, *cases: list[str], processes: int = 1) -> None:
    """Train one run after the other. Each case is a name and overrides."""
    (folder / "program.py").write_text(PROGRAM)
    (folder / "reward.py").write_text(REWARD)
    arguments = [QUICKSTART, *ALIKE, "model.path=model", "parallel.tensor_parallel=1"]
    done = subprocess.run(
        [sys.executable, *torchrun(processes), "program.py", *arguments],
        cwd=folder,
        env=environment(CASES=json.dumps(cases)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
