"""A whole run on a local Ray cluster: two fake servers and two reward workers, each started by an actor."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.train.runs import metrics
from tests.train.served import fake_beside_reward, run_served

# reports the process that scored, and its parent
REWARD = """
import os
from pathlib import Path

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    parent = Path(f"/proc/{os.getppid()}/comm").read_text().strip()
    return {"score": float(os.urandom(1)[0] % 2), "pred": f"{parent} {os.getpid()}"}
"""
ON_RAY = [
    "num_rollout_steps=2",
    "sampling.style=none",
    "sampling.gen_batch_prompts=4",
    "sampling.carry_surplus=false",
    "rollout.sglang.placement=ray",
    "rollout.sglang.num_servers=2",
    "reward.placement=ray",
    "reward.workers=2",
]
SERVER_ACTOR, REWARD_ACTOR = "ray::_Host", "ray::RewardHost"  # or ray::_Host.start, while it does that


@pytest.mark.skipif(find_spec("ray") is None, reason="pip install 'dapo_mcore[ray]'")
def test_servers_and_rewards_of_a_run_are_on_its_cluster(task, tmp_path):
    done = run_served(task, watched(tmp_path), "on-ray", *ON_RAY)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = metrics(task, "on-ray")
    assert [row["updates"] for row in rows] == [1, 2]
    assert all(row["rollout/servers_serving"] == 2 and row["rollout/retries"] == 0 for row in rows)
    files = sorted((task / "runs/on-ray/samples").glob("*.jsonl"))
    scorers = {json.loads(line)["pred"] for file in files for line in file.read_text().splitlines()}
    assert len(scorers) == 2 and all(scorer.startswith(REWARD_ACTOR) for scorer in scorers)
    # each actor asks its node's interpreter what it has, then starts its server with it
    parents = (tmp_path / "parents").read_text().split()
    assert len(parents) == 4 and all(parent.startswith(SERVER_ACTOR) for parent in parents)


def watched(folder: Path) -> Path:
    """Return a fake server's interpreter that records its parent process."""
    fake, script = fake_beside_reward(folder, REWARD, tokens_per_s=2000), folder / "python-watched"
    note = f"cat /proc/$PPID/comm >> {folder / 'parents'}"
    script.write_text(f'#!/bin/sh\n{note}\nexec {fake} "$@"\n')
    script.chmod(0o755)
    return script
