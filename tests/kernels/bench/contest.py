"""Check each contender against fp64, then measure those that are right.

Change here: which errors are accepted, and how a failure is reported.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch

from tests.kernels.bench.contenders import Contender
from tests.kernels.bench.measure import peak_bytes, relative_error, time_calls, worst_row_error
from tests.kernels.bench.problem import Problem, exact_answer
from tests.kernels.bench.report import Errors, Row


def check_all(
    contenders: Sequence[Contender], given: Problem, our_tolerance: float, tolerance: float
) -> dict[str, Row]:
    """Return a row per contender, with its errors and its failure if there is one.

    Raises AssertionError if one of ours is off by more than `our_tolerance`: nothing is measured then.
    """
    rows = {c.name: check(c, given, our_tolerance if c.ours else tolerance) for c in contenders}
    wrong = [
        f"{row.contender}: {row.failure} {row.errors or ''}"
        for c in contenders
        if c.ours and (row := rows[c.name]).failure
    ]
    assert not wrong, f"nothing is reported, because ours is wrong: {'; '.join(wrong)}"
    return rows


def check(contender: Contender, given: Problem, tolerance: float) -> Row:
    """Return the errors against fp64, and the failure: an exception, or gradients off by more than `tolerance`."""
    given = given.on_policy() if contender.on_policy else given
    exact = exact_answer(given)
    given.main_grad.zero_()
    try:
        answer = contender(given)
    except Exception as error:
        return Row(contender.name, failure=one_line(error))
    finally:
        free_memory()
    hidden = relative_error(answer.grad_hidden, exact.grad_hidden)
    weight = relative_error(answer.grad_weight, exact.grad_weight)
    errors = Errors(hidden, weight, worst_row_error(answer.grad_hidden, exact.grad_hidden))
    right = max(hidden, weight) <= tolerance  # a NaN is wrong
    return Row(contender.name, errors=errors, failure=None if right else f"wrong: off by more than {tolerance}")


def measure(contender: Contender, problems: Sequence[Problem], checked: Row) -> Row:
    """Return `checked` with time and peak memory, unless it has failed already or fails now."""
    if checked.failure:
        return checked
    if contender.on_policy:
        problems = [p.on_policy() for p in problems]
    try:
        ms = time_calls(contender, problems)
        peak = peak_bytes(lambda: contender(problems[0]))
    except Exception as error:
        return Row(contender.name, errors=checked.errors, failure=one_line(error))
    finally:
        free_memory()
    return Row(contender.name, ms, None if peak is None else peak / 2**20, checked.errors)


def one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:90]


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
