"""Which path of a script is taken; test_follow.py compares many with bash."""

from __future__ import annotations

import pytest

from tests.foreign.bash.bash_reference import followed, shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("if [ a = a ]; then show 1; else show 2; fi", ["1"]),
        ("[ a = b ] || show 1; [ a = b ] && show 2", ["1"]),
        ("case $UNSET in '') show empty;; *) show other;; esac", ["empty"]),
        ("until [ $n ]; do show once; n=1; done", ["once"]),
        ("(exit 1; show never); show on", ["on"]),
        ("f() { return; show never; }; f; show on", ["on"]),
        ("for x in 1 2 3; do break; done; show $x", ["1"]),
    ],
)
def test_known_conditions(text: str, expected: list[str]) -> None:
    assert [words[0] for words in shown(text)] == expected


def test_a_loop_whose_condition_only_a_run_decides_is_followed_once() -> None:
    (call,) = [call for call in followed("n=0\nwhile curl x; do n=$((n + 1)); done\nshow $n").calls if call.line == 3]
    assert (call.words[1].text, call.words[1].others) == ("1", ("0",))
