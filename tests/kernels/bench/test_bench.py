"""The benchmark itself: it does not time wrong answers or mix files, and its error measures are right."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from tests.kernels.bench import report as reports
from tests.kernels.bench.contenders import CONTENDERS, Contender, chunked, naive
from tests.kernels.bench.contest import check, check_all, measure
from tests.kernels.bench.measure import Timing, time_calls, worst_row_error
from tests.kernels.bench.passes import Pass
from tests.kernels.bench.problem import CPU_CHECK, Shape, exact_answer, make_problem
from tests.kernels.bench.report import Report, Row, results_file, shape_table

CPU = torch.device("cpu")
SHAPE = Shape("tiny", 1, 8, 4, 5, sequences=2)


@pytest.fixture(scope="module")
def given():
    return make_problem(CPU_CHECK, torch.float32, CPU, seed=0, clipped_every=8)


def slightly_wrong(p):
    answer = naive(p)
    return replace(answer, grad_weight=answer.grad_weight * 1.001)


def broken(p):
    raise NotImplementedError("no such kernel\nand more lines")


def test_the_check_has_confident_and_clipped_tokens(given):
    exact = exact_answer(given)
    sizes = exact.grad_hidden.norm(dim=1)
    assert (sizes == 0).sum() == len(sizes) // 8, "every eighth token is beyond a clip bound"
    assert sizes[sizes > 0].min() < 1e-3 * sizes.max()


def test_a_wrong_contender_is_shown_with_its_error_and_not_timed(given):
    row = check(Contender("x", slightly_wrong), given, tolerance=1e-4)
    assert row.errors.grad_weight == pytest.approx(1e-3, rel=0.01) and "wrong" in row.failure
    assert measure(Contender("x", slightly_wrong), [given], row).ms is None


def test_nothing_is_reported_when_ours_is_wrong(given):
    contenders = [Contender("torch", naive), Contender("ours", slightly_wrong, ours=True)]
    with pytest.raises(AssertionError, match=r"nothing is reported, because ours is wrong: ours: .*0.001"):
        check_all(contenders, given, our_tolerance=1e-4, tolerance=1e-4)
    assert check_all(contenders[:1], given, 1e-4, 1e-4)["torch"].failure is None


def test_a_failing_contender_keeps_its_row_with_one_line(given):
    contenders = [Contender("broken", broken), Contender("chunks", chunked), Contender("late", naive, gpu_only=True)]
    rows = check_all(contenders, given, 1e-4, 1e-4)
    assert [rows[name].failure for name in ("broken", "chunks", "late")] == [
        "NotImplementedError: no such kernel", None, "RuntimeError: needs a GPU",
    ]  # fmt: skip
    measured = [measure(c, [given], rows[c.name]) for c in contenders[:2]]
    assert measured[1].ms.p20 <= measured[1].ms.median <= measured[1].ms.p80
    table = shape_table(CPU_CHECK, Timing(1, 1, 1, 1), measured)
    assert table.row_count == 2 and list(table.columns[-1].cells) == ["NotImplementedError: no such kernel", ""]


def test_ligers_torch_fallback_is_not_measured_as_its_kernels(given, monkeypatch):
    ops, native = ModuleType("liger_kernel.ops"), ModuleType("fused_linear_scaled_cross_entropy_tp")
    ops.LigerFusedLinearScaledCrossEntropyTPFunction, native.is_available = None, lambda: False
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", ops)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.cute", ModuleType("cute"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.cute.fused_linear_scaled_cross_entropy_tp", native)
    (contender,) = (c for c in CONTENDERS if c.name == "Liger scaled cross-entropy, TP")
    assert "needs liger-cute-kernels" in check(replace(contender, gpu_only=False), given, 1e-5).failure


def test_inputs_take_turns_and_are_prepared():
    seen, prepared = [], []
    timing = time_calls(seen.append, ["a", "b"], prepared.append)
    assert seen == prepared and seen[:4] == ["a", "b", "a", "b"] and timing.repeats <= len(seen)


def test_the_worst_row_counts_and_an_exactly_zero_row():
    exact = torch.tensor([[3.0, 4.0], [0.0, 1e-6], [0.0, 0.0]], dtype=torch.float64)
    assert worst_row_error(exact + torch.tensor([[0.0, 0.5], [0.0, 1e-6], [0.0, 0.0]]), exact) == pytest.approx(1)
    assert worst_row_error(exact + torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 1e-9]]), exact) == math.inf


def test_a_file_is_continued_by_the_same_commit_and_replaced_by_another(tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "git_commit", lambda: "aaa")
    one = Timing(1.0, 0.9, 1.1, 5)
    Report(tmp_path / "r.json", CPU, 10.0).add_shape(SHAPE, one, [Row("ours", one), Row("x", failure="absent")])
    Report(tmp_path / "r.json", CPU, 10.0).add_passes([Pass("copy", one, 2_000_000)])
    content = json.loads((tmp_path / "r.json").read_text())
    assert [shape["name"] for shape in content["shapes"]] == ["tiny-TP1-T8"]
    assert [row["ms"] and row["ms"]["median"] for row in content["shapes"][0]["rows"]] == [1.0, None]
    assert content["passes"][0]["gb_s"] == 2.0 and content["commit"] == "aaa"
    monkeypatch.setattr(reports, "git_commit", lambda: "bbb")
    Report(tmp_path / "r.json", CPU, 10.0).add_passes([])
    assert json.loads((tmp_path / "r.json").read_text())["shapes"] == []


def test_results_stay_out_of_the_tree_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.delenv(reports.RESULTS_VARIABLE, raising=False)
    assert results_file(CPU, tmp_path).parent == tmp_path
    monkeypatch.setenv(reports.RESULTS_VARIABLE, "kernels/results")
    assert results_file(CPU, tmp_path).as_posix().startswith("kernels/results/cpu-")
