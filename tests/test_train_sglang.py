"""A whole run as users start it, with a real SGLang server and a Megatron actor on two processes (TP2, gloo)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from dapo_mcore.config.sglang import SGLangConfig
from dapo_mcore.rollout.sglang.launch.servers import reserve_port
from tests.rollout.sglang.serving import real_python
from tests.test_train import ROOT, SMALL, task, torchrun  # noqa: F401  the fixture is used by name

STEPS = 3


def train(task: Path, *overrides: str) -> subprocess.CompletedProcess[str]:  # noqa: F811
    config = str(ROOT / "examples/quickstart.yaml")
    return subprocess.run(
        [*torchrun(2), "-m", "dapo_mcore.train", config, *SMALL, *overrides],
        cwd=task,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.sglang
@pytest.mark.parametrize(
    "name, ways",
    {
        "disk": ["rollout.sglang.sync=disk"],
        "distributed": ["rollout.sglang.sync=distributed"],
        "colocated": ["rollout.sglang.colocated=true", "rollout.sglang.sync=tensor", "checkpoint.every=2"],
    }.items(),
)
def test_three_steps_with_a_real_server_follow_every_update(task, name, ways):  # noqa: F811
    server = ["rollout.engine=sglang", "rollout.sglang.device=cpu", f"rollout.sglang.python={real_python()}"]
    done = train(task, *server, *ways, f"name={name}", f"num_rollout_steps={STEPS}", "eval.every=3")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = task / "runs" / name
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
        json.loads(line)["weight_version"]
        for file in sorted((folder / "samples").glob("*.jsonl"))
        for line in file.open()
    ]
    assert sorted(set(versions)) == [0, 1, 2]
    assert ("sync/handover_s" in rows[1]) == (name == "colocated")
    assert (folder / "hf/final/model.safetensors").exists() and (folder / "servers/keys.json").exists()


def test_a_run_without_a_server_it_can_use_ends_on_every_rank_with_the_remedy(task):  # noqa: F811
    with reserve_port(SGLangConfig(), "127.0.0.1", 0) as port:
        url = f"http://127.0.0.1:{port.getsockname()[1]}"
        done = train(task, "rollout.engine=sglang", f"rollout.sglang.urls=[{url}]", "name=none")
    assert done.returncode != 0
    assert f"error: no SGLang server answers: {url}" in done.stderr
    assert "start it, or correct rollout.sglang.urls" in done.stderr
    assert not (task / "runs/none").exists()
