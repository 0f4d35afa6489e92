"""A rehearsal of tools/gpu_check.sh on a CPU: tiny sizes, and a fake SGLang server.

This does not show that a part works on a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.rollout.sglang.fake_server import fake_python

SCRIPT = Path(__file__).parents[2] / "tools" / "gpu_check.sh"
EXPECTED = {
    "kernel-tests": "ok",
    "gpu-tests": "needs GPU",
    "head": "ok",
    "actors": "ok",
    "fp8-tensor": "ok",
    "cuda-graphs-released": "needs GPU",
}


def check(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"GPU_CHECK_TINY": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable} | variables
    return subprocess.run([SCRIPT, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_every_kind_of_part_runs_and_all_results_are_in_one_file(tmp_path):
    done = check(tmp_path, "10", "results", *EXPECTED, SGLANG_PYTHON=str(fake_python(tmp_path)))
    node, *records = map(json.loads, (tmp_path / "results" / "gpu_check.jsonl").read_text().splitlines())
    assert {record["part"]: record["state"] for record in records} == EXPECTED, done.stdout + str(records)
    assert done.returncode == 0 and node["gpu"] is None and node["torch"]
    rows = {record["part"]: record["rows"] for record in records}
    assert rows["head"][0]["shapes"][0]["rows"][0]["contender"] == "ours, 4 GB"
    states = {row["name"]: row["state"] for row in rows["actors"]}
    assert states["tiny-fp32"] == "ok" and states.keys() == {"tiny-fp32", "tiny-fp8-tensorwise"}
    assert all(norm > 0 for norm in rows["actors"][0]["grad_norms"])
    assert rows["fp8-tensor"][0]["num_steps"] == 2 and rows["fp8-tensor"][0]["sync/bytes"] > 0
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == list(EXPECTED) and lines[2].endswith("needs GPU")


def test_a_part_that_fails_keeps_its_last_lines_and_sets_the_exit_status(tmp_path):
    done = check(tmp_path, "10", "results", "fp8-tensor", SGLANG_PYTHON=str(tmp_path / "nothing"))
    record = json.loads((tmp_path / "results" / "gpu_check.jsonl").read_text().splitlines()[-1])
    assert done.returncode == 1 and record["state"] == "failed" and record["rows"][0]["ok"] is False
    assert "rollout.sglang" in "".join(record["last_lines"])


def test_wrong_arguments_name_the_right_ones(tmp_path):
    done = check(tmp_path, "10", "results", "everything")
    assert done.returncode == 2 and "part everything is unknown; use kernel-tests gpu-tests head" in done.stderr
    done = check(tmp_path, "long")
    assert done.returncode == 2 and "MINUTES must be a number, got long" in done.stderr
