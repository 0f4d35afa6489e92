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
        ("1 ** 100000", "1"),
        ("(-1) ** 10001", "-1"),
        ("0 ** 20000", "0"),
        ("2 ** 6000 % 1000", "376"),
        ("2 ** 9999 // 2 ** 9998", "2"),
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
        ("2 ** 10000", OverflowError, "would have at least 10001 bits; at most 10000 are allowed$"),
        ("3 ** 9999", OverflowError, "would have 15849 bits; at most 10000 are allowed$"),
        ("2 ** 2 ** 9999", OverflowError, "would have at least 1000000000000 bits"),
        ("1e308 * 10", OverflowError, "would be beyond 1.798e\\+308"),
        ("1e308 ** 2", OverflowError, "would be beyond 1.798e\\+308"),
        ("1e999", OverflowError, "would be beyond 1.798e\\+308"),
        (
            "1,000 * 3",
            ValueError,
            "^'1,000 \\* 3' is no .*: these are several numbers; a comma is no part of a number$",
        ),
        ("(1,000) * 3", ValueError, "^'\\(1,000\\) \\* 3' is no .*; a comma is no part of a number$"),
        ("1,050", ValueError, "leading zeros .*; a comma is no part of a number$"),
        ("1 2", ValueError, "^'1 2' is no arithmetic expression: invalid syntax$"),
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
