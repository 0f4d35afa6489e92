"""Whole-number expressions; test_follow.py compares generated ones with bash."""

from __future__ import annotations

import pytest

from dapo_mcore.foreign.bash.arithmetic import NotArithmetic, NotSet, compute, names_in


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2 + 3 * 4", 14),
        ("(2 + 3) * 4", 20),
        ("-7 / 2", -3),
        ("-7 % 2", -1),
        ("2 ** 3 ** 2", 512),
        ("10 - 3 - 2", 5),
        ("a + b", 9),
        ("a > 3 ? 1 : 2", 1),
        ("0x10 + 010 + 2#11", 27),
        ("c", 9),
        ("", 0),
    ],
)
def test_expressions(text: str, expected: int) -> None:
    assert compute(text, {"a": "4", "b": "5", "c": "a + b"}) == expected


def test_assignments_change_the_variables() -> None:
    values = {"i": "1"}
    assert compute("i++ + (j = 5)", values) == 6
    assert values == {"i": "2", "j": "5"}


def test_what_bash_refuses_or_nobody_knows_raises() -> None:
    for text in ("1 / 0", "1.5", "2 +", "(1", "1 2", "2 ** 100", "a b", "09"):
        with pytest.raises(NotArithmetic):
            compute(text, {"a": "1", "b": "1"})
    with pytest.raises(NotSet, match="x"):
        compute("x + 1", {})
    with pytest.raises(NotArithmetic):
        compute("x", {"x": "y", "y": "x"})


def test_names() -> None:
    assert names_in("a + b * a + 0x1f") == ["a", "b"]
