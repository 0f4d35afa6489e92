"""Doubt about a part becomes doubt about the whole."""

from __future__ import annotations

from dapo_mcore.foreign.bash.values import Value, derived, either, not_known


def test_a_derived_text_has_every_doubt_of_its_inputs() -> None:
    a = Value("1", 1, (), ("2", "3"), ("line 1: if a",))
    b = not_known("X", "${X}", 2)
    assert derived(lambda x, y: f"{x}-{y}", [a, b], 5) == Value(
        "1-${X}", 5, ("X",), ("2-${X}", "3-${X}"), ("line 1: if a",)
    )


def test_either_of_two_texts_keeps_the_first_and_names_the_other() -> None:
    assert either([Value("1", 1), Value("2", 2)], "c") == Value("1", 1, (), ("2",), ("c",))
    assert either([None, Value("2", 2)], "c") == Value("2", 2, (), (), ("c",))
    assert either([Value("1", 1), Value("1", 1)], "c") == Value("1", 1)
    assert either([None, None], "c") is None
