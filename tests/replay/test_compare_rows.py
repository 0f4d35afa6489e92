from __future__ import annotations

import json
import math

from dapo_mcore.replay.compare import Verdict
from dapo_mcore.replay.compare_rows import compare_rows, only_in_one, rows_of

ROW = {"step": 3.0, "reward/mean": 0.5, "actor/loss": math.nan, "val/held-out/acc": 1.0}


def test_metrics_of_the_machine_are_left_out():
    machine = {
        "time/step_s": 1.0,
        "perf/mfu/actor": 0.3,
        "memory/rss_gib": 2.0,
        "sync/write_s": 1.0,
        "sync/gb_per_s": 2.0,
    }
    other = ROW | {name: 2 * value for name, value in machine.items()}
    check = compare_rows(ROW | machine, other)
    assert (check.verdict, check.detail) == (Verdict.EQUAL, "3 metrics")


def test_the_first_metric_that_differs_is_named():
    check = compare_rows(ROW, ROW | {"actor/loss": 0.25, "val/held-out/acc": 0.5})
    assert check.detail == "actor/loss nan against 0.25; 2 of 3 metrics differ"


def test_a_metric_that_one_run_lacks_hides_no_difference():
    other = {"step": 3.0, "actor/loss": 0.25, "time/eval_s": 1.0}
    check = compare_rows({"val/a/acc": 1.0, **ROW}, other)
    assert check.detail == "actor/loss nan against 0.25; 1 of 1 metrics differ"
    assert compare_rows(other, {**ROW, "actor/loss": 0.25}).verdict is Verdict.EQUAL
    assert only_in_one(ROW, other) == ["reward/mean", "val/held-out/acc"]


def test_the_last_row_of_a_step_holds(tmp_path):
    rows = [{"step": 1, "actor/loss": 1.0}, {"step": 2, "actor/loss": 2.0}, {"step": 1, "actor/loss": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert {step: row["actor/loss"] for step, row in rows_of(tmp_path).items()} == {1: 3.0, 2: 2.0}
