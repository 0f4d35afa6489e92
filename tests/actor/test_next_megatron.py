"""The newest supported megatron-core: a part of the actor's tests on it, and a run that is resumed on it.

DAPO_MCORE_MEGATRON_NEXT names the folder of its unpacked wheel (.ci/run unpacks one). All tests on it:
PYTHONPATH=$DAPO_MCORE_MEGATRON_NEXT python -m pytest tests/actor tests/architecture
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEXT = os.environ.get("DAPO_MCORE_MEGATRON_NEXT", "")
pytestmark = pytest.mark.skipif(not NEXT, reason="set DAPO_MCORE_MEGATRON_NEXT to a folder with a newer megatron-core")

PART = [
    "test_parity.py::test_three_steps_equal_the_fp64_reference_and_broken_scaling_does_not[TP2PP1CP1DP1SP]",
    "test_parity.py::test_three_interleaved_stages_with_uneven_chunks_and_empty_micro_batches",
    "test_parity.py::test_families_and_tied_embeddings_over_tensor_and_pipeline_stages[qwen2-True]",
    "model/test_policy.py::test_logits_and_gradients_equal_the_fp64_run_of_transformers[TP1PP1CP1DP1]",  # latent attention, too
    "model/test_experts.py::test_the_gradient_is_that_of_one_fp64_process[TP1PP1CP1DP2EP2]",
    "test_critic.py::test_values_advantages_and_gradient_equal_the_fp64_reference[TP2PP1CP1DP1SP]",
    "model/test_megatron_fields.py",
    "model/test_swiglu.py",
]
SMALL = [
    *("rollout.group_size=4", "rollout.max_response_tokens=12", "reward.overlong.cache=4", "sampling.style=none"),
    *(
        "sampling.train_batch_prompts=8",
        "sampling.gen_batch_prompts=8",
        "batch.mini_batch_prompts=4",
        "warm_start=null",
    ),
    *("eval.sets={}", "checkpoint.every=1", "checkpoint.keep=4", "observe.plot_at_end=false"),
]


def run(folder: Path, *command: str) -> str:
    """Run a Python command that finds the newer megatron-core before the installed one. Return its output."""
    path = os.pathsep.join([NEXT, str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_the_newest_megatron_is_another_version_than_the_installed_one():
    told = "m.version('megatron-core'), u.find_spec('megatron.core').origin"
    script = f"import importlib.metadata as m, importlib.util as u; print({told})"
    version, origin = run(ROOT, "-c", script).split()
    assert Path(origin).is_relative_to(NEXT)
    assert version.startswith("0.19."), "the newest version that setup.py admits"


def test_gradients_and_fields_are_right_on_the_newest_megatron():
    out = run(ROOT, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/actor/{name}" for name in PART))
    assert " passed" in out and "skipped" not in out, out


def test_a_run_is_resumed_on_the_newest_megatron_with_another_layout(tmp_path):
    run(tmp_path, str(ROOT / "examples/arithmetic.py"), "--out", "runs/arithmetic")
    train = ["-m", "dapo_mcore.train", str(ROOT / "examples/quickstart.yaml"), *SMALL, "name=next"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    run(tmp_path, *torchrun, *train, "num_rollout_steps=1")
    out = run(tmp_path, *train, "num_rollout_steps=2", "parallel.tensor_parallel=1")
    assert "resumed after rollout step 1" in out
    rows = [json.loads(line) for line in (tmp_path / "runs/next/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["actor/first_update_ratio_deviation"] == 0.0 and row["actor/skipped_updates"] == 0 for row in rows)
