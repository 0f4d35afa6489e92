"""Whole runs whose gradients are never finite."""

from __future__ import annotations

import json
from pathlib import Path

from tests.train.runs import QUICKSTART, SMALL, python

# two runs in one process: importing takes longer
POISONED = """
import sys
from dapo_mcore.actor import wrap
from dapo_mcore.train.__main__ import main

finalize = wrap.finalize_without_division

def poison(model, *args, **kwargs):
    finalize(model, *args, **kwargs)
    next(model[0].module.parameters()).main_grad.view(-1)[0] = float("nan")

wrap.finalize_without_division = poison
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
    first = "warning: gradient step 1 was skipped on all ranks: first not finite: gradient of embedding.word_embeddings.weight"
    assert out.count(first) == 2 and out.count(" was skipped on all ranks: ") == 4 + 3, out
    assert out.count("| skipped 2 |") == 2 + 1, "each finished rollout step's line tells it"
    few, many = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert few.startswith("error: all 4 gradient steps of this run were skipped")
    assert many.startswith("error: the last 3 gradient steps were skipped") and "max_skipped_updates" in many
    assert "first not finite: gradient of" in many and "Traceback" not in done.stderr
    for name, count in (("few", 4), ("many", 3)):
        written = sorted((task / "runs" / name / "skipped").iterdir())
        assert [folder.name for folder in written] == [f"update_{n:06d}" for n in range(1, count + 1)]
        facts = [json.loads((folder / "skip.json").read_text()) for folder in written]
        assert all(sample["uid"] for one in facts for sample in one["samples"]) and all(one["samples"] for one in facts)
    assert not (task / "runs/few/hf/final").exists(), "nothing that looks like a trained model"
