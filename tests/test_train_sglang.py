"""A whole run as users start it, with a real SGLang server and a Megatron actor on two processes (TP2, gloo)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rollout.sglang.serving import real_python
from tests.test_train import ROOT, SMALL

STEPS = 3


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    """The quickstart's data and model, in a folder of its own."""
    folder = tmp_path_factory.mktemp("task")
    made = [sys.executable, str(ROOT / "examples/arithmetic.py"), "--out", "runs/arithmetic"]
    subprocess.run(made, cwd=folder, check=True, capture_output=True)
    return folder


def train(task: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    config = str(ROOT / "examples/quickstart.yaml")
    return subprocess.run(
        [*launcher, "-m", "dapo_mcore.train", config, *SMALL, *overrides],
        cwd=task,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.sglang
@pytest.mark.parametrize("sync", ["disk", "distributed"])
def test_three_steps_with_a_real_server_follow_every_update(task, sync):
    server = ["rollout.engine=sglang", "rollout.sglang.device=cpu", f"rollout.sglang.python={real_python()}"]
    name = f"name={sync}"
    done = train(task, *server, name, f"rollout.sglang.sync={sync}", f"num_rollout_steps={STEPS}", "eval.every=3")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = task / "runs" / sync
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [*range(STEPS + 1)]
    assert rows[0]["val/heldout/mean@2"] >= 0 and rows[STEPS]["val/heldout/mean@2"] >= 0
    for row in rows[1:]:
        # after each update the server's log-probs are the actor's: the weights arrived
        assert row["mismatch/logprob_diff_max"] < 1e-4, row
        assert row["actor/first_update_ratio_deviation"] == 0.0
        assert row["actor/grad_norm"] > 0
        assert row["rollout/servers_serving"] == 1 and row["rollout/retries"] == 0
        assert row["sync/bytes"] == 4 * 125_504
    assert rows[STEPS]["updates"] == 2 * STEPS
    versions = [
        json.loads(line)["weight_version"] for file in sorted((folder / "samples").iterdir()) for line in file.open()
    ]
    assert sorted(set(versions)) == [0, 1, 2]
    assert (folder / "hf/final/model.safetensors").exists() and (folder / "servers/keys.json").exists()


def test_a_run_without_a_server_it_can_use_ends_on_every_rank_with_the_remedy(task):
    done = train(task, "rollout.engine=sglang", "rollout.sglang.urls=[http://127.0.0.1:9]", "name=none")
    assert done.returncode != 0
    assert "error: no SGLang server answers: http://127.0.0.1:9" in done.stderr
    assert "start it, or correct rollout.sglang.urls" in done.stderr
    assert not (task / "runs/none").exists()
