"""Hydra's overrides, as hydra 1.3 parses them."""

from __future__ import annotations

from typing import Any

import pytest

from dapo_mcore.foreign.read.hydra import override, value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b=1", ("a.b", 1, False)),
        ("+a.b=1e-6", ("a.b", 1e-6, False)),
        ("++a.b-c=x=y", ("a.b-c", "x=y", False)),
        ("~a.b", ("a.b", None, True)),
        ("~a.b=1", ("a.b", None, True)),
        ("a=", ("a", "", False)),
        ("data@x.y=c", ("data@x.y", "c", False)),
        ("a", None),
        ("--a=1", None),
        ("", None),
        ("=1", None),
    ],
)
def test_overrides(text: str, expected: tuple[str, Any, bool] | None) -> None:
    assert override(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", 1),
        ("-1", -1),
        ("1_000", 1000),
        ("007", "007"),
        ("1.", 1.0),
        (".5", 0.5),
        ("1e3", 1000.0),
        ("inf", float("inf")),
        ("true", True),
        ("False", False),
        ("null", None),
        ("None", "None"),
        ("'1'", "1"),
        ('"a b"', "a b"),
        (r"'it\'s'", "it's"),
        ("[a,b]", ["a", "b"]),
        ("['a', 1, null]", ["a", 1, None]),
        ("[]", []),
        ("[[1,2],[3]]", [[1, 2], [3]]),
        ("{a:1,b:{c:[x]}}", {"a": 1, "b": {"c": ["x"]}}),
        ("{a: 'x, y'}", {"a": "x, y"}),
        ('["console","wandb"]', ["console", "wandb"]),
        ("${a.b}", "${a.b}"),
        ("[/x/${Y},2]", ["/x/${Y}", 2]),
        ("a b c", "a b c"),
        ("/p/q:r", "/p/q:r"),
        ("[a", "[a"),
        ("'a", "'a"),
        ("[a]b", "[a]b"),
    ],
)
def test_values(text: str, expected: Any) -> None:
    found = value(text)
    assert found == expected
    assert type(found) is type(expected)
