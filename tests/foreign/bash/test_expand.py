"""Fields of words; test_follow.py compares many with bash."""

from __future__ import annotations

from dapo_mcore.foreign.bash.expand import Expander, not_run
from dapo_mcore.foreign.bash.scope import Scope
from dapo_mcore.foreign.bash.values import Value
from dapo_mcore.foreign.bash.words import Scanner


def fields(text: str, **variables: Value) -> list[Value]:
    return Expander(Scope("run.sh", dict(variables)), not_run).fields(Scanner(text, "run.sh").word())


def test_an_unquoted_value_is_split_and_keeps_its_condition() -> None:
    found = fields("k=$x", x=Value("a b", 0, (), (), ("c",)))
    assert [(value.text, value.depends) for value in found] == [("k=a", ("c",)), ("b", ("c",))]


def test_a_value_that_may_be_empty_gives_its_other_fields() -> None:
    found = fields("$x", x=Value("", 0, (), ("a=1 b=2",), ("c",)))
    assert [(value.text, value.depends) for value in found] == [("a=1", ("c",)), ("b=2", ("c",))]


def test_what_is_not_known_is_not_split_and_not_cut() -> None:
    assert [(value.text, value.unknown) for value in fields("${x##*/}", x=Value("${Y} z", 0, ("Y",)))] == [
        ("${x##*/}", ("Y",))
    ]
