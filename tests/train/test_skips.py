"""Whole runs whose gradients are never finite."""

from __future__ import annotations

from pathlib import Path

from tests.train.runs import QUICKSTART, SMALL, python

# two runs in one process: importing takes longer
POISONED = """
import sys
from dapo_mcore.actor import actor
from dapo_mcore.train.__main__ import main

finalize = actor.finalize_without_division

def poison(model, *args, **kwargs):
    finalize(model, *args, **kwargs)
    next(model[0].module.parameters()).main_grad.view(-1)[0] = float("nan")

actor.finalize_without_division = poison
for case in ("name=few", "name=many optimizer.max_skipped_updates=3"):
    print("STATUS", main([*sys.argv[1:], *case.split()]), flush=True)
"""


def test_skipped_steps_are_shown_at_once_and_a_run_without_any_other_ends_with_status_2(task: Path) -> None:
    settings = ["warm_start=null", "eval.sets={}", "parallel.tensor_parallel=1", "num_rollout_steps=2"]
    done = python(task, "-c", POISONED, QUICKSTART, *SMALL, *settings)
    out = " ".join(done.stdout.split())
    assert [word for word in done.stdout.splitlines() if word.startswith("STATUS")] == ["STATUS 2"] * 2, (
        out + done.stderr
    )
    assert out.count("warning: 2 of this rollout step's 2 gradient steps were skipped") == 3, out
    few, many = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert few.startswith("error: all 4 gradient steps of this run were skipped")
    assert many.startswith("error: the last 3 gradient steps were skipped") and "max_skipped_updates" in many
    assert "Traceback" not in done.stderr
    assert not (task / "runs/few/hf/final").exists(), "nothing that looks like a trained model"
