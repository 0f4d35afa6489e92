"""A rehearsal of tools/gpu_check.sh on a CPU: tiny sizes, and a fake SGLang server.

This does not show that a part works on a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.rollout.sglang.fake_server import fake_python
from tools.gpu_check import __main__ as gpu_check

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


def test_parts_of_every_kind_run_and_all_results_are_in_one_file(tmp_path):
    done = check(tmp_path, "10", "results", *EXPECTED, SGLANG_PYTHON=str(fake_python(tmp_path)))
    node, *records = map(json.loads, (tmp_path / "results" / "gpu_check.jsonl").read_text().splitlines())
    assert {record["part"]: record["state"] for record in records} == EXPECTED, done.stdout + str(records)
    assert done.returncode == 0 and node["gpu"] is None and node["torch"]
    rows = {record["part"]: record["rows"] for record in records}
    assert rows["head"][0]["shapes"][0]["rows"][0]["contender"] == "ours, 4 GB"
    states = {row["name"]: row["state"] for row in rows["actors"]}
    assert states == {"tiny-fp32": "ok", "tiny-fp8-tensorwise": "ok"}
    assert all(norm > 0 for norm in rows["actors"][0]["grad_norms"])
    assert rows["fp8-tensor"][0]["num_steps"] == 2 and rows["fp8-tensor"][0]["sync/bytes"] > 0
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == list(EXPECTED) and lines[2].endswith("needs GPU")


@pytest.mark.parametrize(
    ("code", "minutes", "time_left_s", "state"),
    [
        ("print('why'); raise SystemExit(3)", 1, 600, "failed"),
        ("import time; print('why', flush=True); time.sleep(60)", 0.03, 600, "timeout"),
        ("print('why')", 1, 1, "no time left"),
    ],
)
def test_a_part_that_fails_or_is_late_keeps_its_rows_and_last_lines(tmp_path, code, minutes, time_left_s, state):
    row = "import sys, pathlib; pathlib.Path(sys.argv[1], 'rows.jsonl').write_text('{\"a\": 1}'); "
    part = gpu_check.Part("some", minutes, ("-c", row.replace("{", "{{").replace("}", "}}") + code, "{folder}"))
    record = gpu_check.run(part, tmp_path / "some", time.monotonic() + time_left_s)
    kept = ([], []) if state == "no time left" else ([{"a": 1}], ["why"])
    assert (record.state, record.rows, record.last_lines) == (state, *kept) and record.seconds < 30


def test_wrong_arguments_name_the_right_ones(tmp_path):
    done = check(tmp_path, "10", "results", "everything")
    assert done.returncode == 2 and "part everything is unknown; use kernel-tests gpu-tests head" in done.stderr
    done = check(tmp_path, "long")
    assert done.returncode == 2 and "MINUTES must be a number, got long" in done.stderr
