"""The policy head compared with other packages: time, memory and error. Run: pytest -m bench tests/kernels

A GPU measures the real shapes, or some of them with -k, as in -k "32B-TP1"; a CPU small ones, as a check of the benchmark.
The JSON goes to a temporary folder, or to $DAPO_MCORE_BENCH_RESULTS (kernels/results for a result to keep). The other
packages are optional; the table shows why one that is missing or fails has no numbers. If our own gradients differ from
fp64, nothing is measured. A TP8 shard is one rank's part of the vocabulary, without the collective.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rich.console import Console

from tests.kernels.bench import problem
from tests.kernels.bench.contenders import CONTENDERS
from tests.kernels.bench.contest import check_all, measure
from tests.kernels.bench.measure import copy_gb_s, num_copies, three_gemms
from tests.kernels.bench.passes import measure_passes
from tests.kernels.bench.problem import make_problem
from tests.kernels.bench.report import Report, Row, pass_table, results_file, shape_table

pytestmark = pytest.mark.bench

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
SHAPES, PASS_SHAPES, PASS_ROWS, CHECK_SHAPE = (
    (problem.GPU_SHAPES, problem.GPU_PASSES, 4_096, problem.GPU_CHECK)
    if GPU
    else (problem.CPU_SHAPES, problem.CPU_SHAPES[:1], 64, problem.CPU_CHECK)
)
# Rounding gradients to bf16 costs 1.6e-3, rounding logits 5e-3; cut-cross-entropy leaves small gradients out.
OUR_TOLERANCE, TOLERANCE = (4e-3, 5e-2) if GPU else (1e-5, 1e-5)


@pytest.fixture(scope="module")
def checked() -> dict[str, Row]:
    """Check every contender on the check shape."""
    given = make_problem(CHECK_SHAPE, DTYPE, DEVICE, seed=0, clipped_every=8)
    return check_all(CONTENDERS, given, OUR_TOLERANCE, TOLERANCE)


@pytest.fixture(scope="module")
def report(checked, tmp_path_factory) -> Report:
    return Report(results_file(DEVICE, tmp_path_factory.mktemp("bench")), DEVICE, copy_gb_s(DEVICE))


@pytest.fixture
def show(capsys) -> Callable[..., None]:
    """Return a function that prints past pytest's capture."""

    def print_now(*tables: object) -> None:
        with capsys.disabled():
            Console(width=190).print("\n", *tables)

    return print_now


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(shape, checked, report, show):
    one = make_problem(shape, DTYPE, DEVICE, seed=0, clipped_every=256)
    copies = num_copies((one.hidden.numel() + one.weight.numel()) * DTYPE.itemsize, DEVICE)
    more = [make_problem(shape, DTYPE, DEVICE, seed, clipped_every=256) for seed in range(1, copies)]
    problems = [one, *more]
    gemms = three_gemms(problems)
    rows = [measure(contender, problems, checked[contender.name]) for contender in CONTENDERS]
    report.add_shape(shape, gemms, rows)
    show(shape_table(shape, gemms, rows), f"→ {report.path}")


@pytest.mark.parametrize("shape", PASS_SHAPES, ids=str)
def test_memory_bound_passes(shape, report, show):
    passes = list(measure_passes(shape, PASS_ROWS, DTYPE, DEVICE))
    report.add_passes(passes)
    show(pass_table(passes, report.copy_gb_s))
