"""The calculator: arithmetic, and nothing else."""

from __future__ import annotations

import pytest

from dapo_mcore.tools.calculator import calculate


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2 * 3", "7"),
        ("-(2 - 5) ** 2", "-9"),
        ("2 ^ 10", "1024"),
        ("7 / 2", "3.5"),
        ("7 // 2 + 7 % 2", "4"),
        (" sqrt(16) ", "4.0"),
        ("max(1, 2, 3) - gcd(12, 18)", "-3"),
        ("round(pi, 2)", "3.14"),
        ("123456789 * 987654321", "121932631112635269"),
        ("2 ** -1", "0.5"),
        ("1e3", "1000.0"),
    ],
)
def test_values(expression: str, value: str):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "error", "reason"),
    [
        ("", ValueError, "is no arithmetic expression"),
        ("1 +", ValueError, "is no arithmetic expression"),
        ("__import__('os')", ValueError, "is not arithmetic; allowed are"),
        ("(1).__class__", ValueError, "is not arithmetic"),
        ("'a' * 9", ValueError, "is not arithmetic"),
        ("True + 1", ValueError, "is not arithmetic"),
        ("[1 for _ in x]", ValueError, "is not arithmetic"),
        ("1 < 2", ValueError, "is not arithmetic"),
        ("lambda: 1", ValueError, "is not arithmetic"),
        ("max(*[1])", ValueError, "is not arithmetic"),
        ("round(1, ndigits=1)", ValueError, "is not arithmetic"),
        ("1 / 0", ZeroDivisionError, "division"),
        ("9 ** 9 ** 9", OverflowError, "at most 10000 are allowed"),
        ("(2 ** 9000) * (2 ** 9000)", OverflowError, "at most 10000 are allowed"),
        ("(-8) ** 0.5", ValueError, "no real number"),
        ("exp(1e9)", OverflowError, "math range error"),
        ("1" * 1001, ValueError, "at most 1000 are allowed"),
        ("(" * 400 + "1" + ")" * 400, ValueError, "no arithmetic expression|nested"),
        ("-" * 990 + "1", ValueError, "no arithmetic expression|nested"),
    ],
)
def test_what_is_refused(expression: str, error: type[Exception], reason: str):
    with pytest.raises(error, match=reason):
        calculate(expression)
