"""Conditions in three values."""

from __future__ import annotations

import pytest

from dapo_mcore.foreign.bash.conditions import holds
from dapo_mcore.foreign.bash.values import Value

ENVIRONMENT = Value("${X}", 1, ("X",))
OUTPUT = Value("$(ls)", 1, ("$(ls)",))


def words(text: str) -> list[Value]:
    return [{"X": ENVIRONMENT, "OUT": OUTPUT, "EMPTY": Value("")}.get(word, Value(word)) for word in text.split()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a = a", True),
        ("a != a", False),
        ("10 -gt 9", True),
        ("EMPTY -lt 1", True),
        ("-z X", True),
        ("-n X", False),
        ("X = fast", False),
        ("abc == a*", True),
        ("abc =~ ^a.c$", True),
        ("! a = b", True),
        ("a = a && b = c", False),
        ("a = b || b = b", True),
        ("( a = b ) || a", True),
        ("-f run.sh", None),
        ("OUT = 1", None),
        ("a = b && OUT = 1", False),
        ("a = a || OUT = 1", True),
        ("x -gt 1", None),
        ("EMPTY", False),
    ],
)
def test_conditions(text: str, expected: bool | None) -> None:
    assert holds(words(text)) is expected
