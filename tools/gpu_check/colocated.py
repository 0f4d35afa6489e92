"""Train a few steps with an SGLang server on the trainer's own GPU, and report times and mismatch.

    python -m tools.gpu_check.colocated NAME FOLDER        # from the root of the repository; writes FOLDER/NAME.json

Change here: the runs in SETTINGS. The model has the shapes of Qwen2.5-0.5B and random weights. A run is ok if it completes
all steps and no server was restarted or excluded. GPU_CHECK_TINY=1 runs a tiny model on a CPU.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TINY = os.environ.get("GPU_CHECK_TINY") == "1"
NUM_STEPS = 2 if TINY else 3
QWEN_0_5B = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
SERVER = "mem-fraction-static: 0.5, max-total-tokens: 131072, attention-backend: fa3, sampling-backend: pytorch"
NO_GRAPHS = f"rollout.sglang.server_args={{{SERVER}, disable-cuda-graph: true}}"
GRAPHS = f"rollout.sglang.server_args={{{SERVER}, cuda-graph-backend-prefill: disabled, cuda-graph-max-bs-decode: 128}}"
SETTINGS = {
    "fp8-tensor": ("rollout.sglang.sync=tensor", "rollout.sglang.quantize=fp8", NO_GRAPHS),
    "fp8-disk": ("rollout.sglang.sync=disk", "rollout.sglang.quantize=fp8", NO_GRAPHS),
    "cuda-graphs": ("rollout.sglang.sync=tensor", GRAPHS),
    "cuda-graphs-released": ("rollout.sglang.sync=tensor", GRAPHS),
}
MEASURED = ("sync/", "mismatch/logprob", "mismatch/k3", "time/", "memory/")


def main(name: str, folder: Path) -> int:
    """Run the training command and write its row. Return 1 unless the run is ok."""
    # gpu_check ends a late run by SIGTERM to all its processes; the trainer then stops its server, and the row is written.
    signal.signal(signal.SIGTERM, lambda *_: None)
    if name == "cuda-graphs-released":
        os.environ["SGLANG_MEMORY_SAVER_CUDA_GRAPH"] = "1"
    with tempfile.TemporaryDirectory() as work:
        command = training_command(name, Path(work))
        start = time.monotonic()
        status = subprocess.run(command).returncode
        row = summary(Path(work) / "runs" / name, status) | {"seconds": round(time.monotonic() - start, 1)}
    (folder / f"{name}.json").write_text(json.dumps({"run": name, **row}, indent=1) + "\n")
    return int(not row["ok"])


def training_command(name: str, work: Path) -> list[str]:
    """Make data and model in `work`, and return the command that trains on them."""
    task = work / "arithmetic"
    subprocess.run([sys.executable, "examples/arithmetic.py", "--out", str(task)], check=True)
    if not TINY:
        config = task / "model" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **QWEN_0_5B}))
    settings = [
        f"name={name}", f"output_dir={work}/runs", f"num_rollout_steps={NUM_STEPS}", f"model.path={task}/model",
        "model.dtype=bf16", f"data.files=[{task}/train.jsonl]", "warm_start=null",
        "eval.sets={}", "parallel.tensor_parallel=1", "optimizer.lr=1e-6", "sampling.style=none",
        "sampling.gen_batch_prompts=8", "sampling.train_batch_prompts=8",
        f"rollout.max_response_tokens={16 if TINY else 512}", "checkpoint.at_end=false",
        "checkpoint.export_at_end=false", "observe.plot_at_end=false", "rollout.engine=sglang",
        "rollout.sglang.colocated=true", f"rollout.sglang.device={'cpu' if TINY else 'cuda'}", *_sglang_python(work),
        *(setting for setting in SETTINGS[name] if not (TINY and "server_args" in setting)),
    ]  # fmt: skip
    return [sys.executable, "-m", "dapo_mcore.train", "examples/quickstart.yaml", *settings]


def summary(run: Path, status: int) -> dict[str, Any]:
    """Return the medians of a run's metrics, without the first step; for a run that is not ok, the server's last lines."""
    metrics, log = run / "metrics.jsonl", run / "servers" / "server-0.log"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    lost = {key: sum(row.get(f"rollout/{key}", 0) for row in rows) for key in ("server_restarts", "servers_excluded")}
    ok = status == 0 and len(rows) == NUM_STEPS and not any(lost.values())
    later = rows[1:]  # the first step warms up
    names = [name for name in (later or [{}])[0] if name.startswith(MEASURED)]
    medians = {name: statistics.median(row[name] for row in later if name in row) for name in names}
    lines = log.read_text(errors="replace").splitlines()[-60:] if log.exists() and not ok else []
    return {"ok": ok, "status": status, "num_steps": len(rows), **lost, **medians, "server_log": lines}


def _sglang_python(work: Path) -> list[str]:
    """Return the setting for SGLANG_PYTHON, through a script that drops the trainer's PYTHONPATH and cuDNN."""
    if "SGLANG_PYTHON" not in os.environ:
        return []
    script = work / "python"
    script.write_text(f'#!/bin/sh\nunset LD_PRELOAD PYTHONPATH\nexec "{os.environ["SGLANG_PYTHON"]}" "$@"\n')
    script.chmod(0o755)
    return [f"rollout.sglang.python={script}"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
