"""Variables, arrays and arguments."""

from __future__ import annotations

from dapo_mcore.foreign.bash.scope import Scope, merged, unset
from dapo_mcore.foreign.bash.values import Value


def texts(scope: Scope, name: str) -> list[str]:
    return [value.text for value in scope.array(name, 1)]


def test_items_without_an_index_follow_the_last() -> None:
    scope = Scope("run.sh")
    scope.set_array("A", [("", Value("a")), ("5", Value("f")), ("", Value("g"))], append=False)
    scope.set_array("A", [("", Value("h"))], append=True)
    assert list(scope.variables["A"]) == ["0", "5", "6", "7"]
    scope.set("A", Value("z"), "0")
    assert texts(scope, "A") == ["z", "f", "g", "h"]
    assert scope.value("A", 3).text == "z"


def test_what_the_script_does_not_set() -> None:
    scope = Scope("run.sh")
    assert scope.value("X", 1) is None
    assert scope.value("1", 1) is None
    assert scope.value("HOME", 1).text == "~"
    assert unset("1", 4).unknown == ("argument 1",)
    scope.in_function = True
    assert scope.value("1", 1).text == ""


def test_merged_scopes_keep_what_all_agree_on() -> None:
    first, second = Scope("run.sh"), Scope("run.sh")
    for scope, text in ((first, "1"), (second, "2")):
        scope.set("same", Value("s"))
        scope.set("other", Value(text))
        scope.set_array("A", [("", Value("a"))], append=False)
    second.set_array("A", [("", Value("b"))], append=True)
    both = merged([first, second], "c")
    assert both.value("same", 0) == Value("s")
    assert both.value("other", 0) == Value("1", 0, (), ("2",), ("c",))
    assert [(value.text, value.depends) for value in both.array("A", 0)] == [("a", ()), ("b", ("c",))]
