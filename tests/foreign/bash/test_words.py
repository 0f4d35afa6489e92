"""Words as trees."""

from __future__ import annotations

import pytest

from dapo_mcore.errors import ConfigError
from dapo_mcore.foreign.bash.words import Arithmetic, Literal, Output, Parameter, Scanner, Word, nested


def parts(text: str) -> tuple[object, ...]:
    return Scanner(text, "run.sh").word().parts


def test_quotes_mark_their_text() -> None:
    assert parts("a'b c'\"d\"e") == (Literal("a", False), Literal("b cd", True), Literal("e", False))
    assert parts("''") == (Literal("", True),)


def test_expansions_are_kept_as_trees() -> None:
    assert parts("$x") == (Parameter("x", None, "", None, False),)
    assert parts('"${A[1]:-d}"') == (
        Parameter("A", Word((Literal("1", False),), 1), ":-", Word((Literal("d", True),), 1), True),
    )
    assert parts("$(a (b) ')')`c`") == (Output("a (b) ')'", False), Output("c", False))
    assert parts("$((1+(2)))") == (Arithmetic(Word((Literal("1+(2)", False),), 1), False),)
    assert parts("${#x}${!y}") == (
        Parameter("x", None, "length", None, False),
        Parameter("y", None, "indirect", None, False),
    )


def test_a_word_ends_at_blanks_and_signs_outside_quotes() -> None:
    scanner = Scanner("a\\ b\\\nc d", "run.sh")
    assert scanner.word().parts == (Literal("a", False), Literal(" ", True), Literal("bc", False))
    assert scanner.line == 2


def test_lines_are_counted_from_the_first() -> None:
    assert nested("a", "run.sh", 7).line == 7
    scanner = Scanner("a\n\nb", "run.sh", 10)
    scanner.at = 3
    assert scanner.line == 12


@pytest.mark.parametrize("text", ["'a", '"a', "$(a", "${a", "`a", "$'a"])
def test_what_is_never_closed_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.sh line 1: .* is never closed"):
        parts(text)
