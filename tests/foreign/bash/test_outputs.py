"""Outputs that follow from a command's words alone."""

from __future__ import annotations

import pytest

from dapo_mcore.foreign.bash.outputs import printed


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("basename /a/b.sh .sh", "b"),
        ("basename -- /a/", "a"),
        ("dirname a", "."),
        ("dirname /a/b/", "/a"),
        ("seq 3", "1\n2\n3"),
        ("seq 5 -2 1", "5\n3\n1"),
        ("echo -n a b", "a b"),
        ("seq 1 100000", None),
        ("seq a", None),
        ("date", None),
        ("cat run.sh", None),
    ],
)
def test_printed(words: str, expected: str | None) -> None:
    assert printed(words.split()) == expected
