"""Nested YAML as dotted settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from dapo_mcore.errors import ConfigError
from dapo_mcore.foreign.read.tree import load_tree, settings_of


def resolved(tree: dict) -> dict:
    return {setting.key: setting.value for setting in settings_of(tree, "c.yaml")}


def test_interpolations_are_resolved() -> None:
    tree = {
        "a": {"n": 4, "twice": "${mul:${a.n},2}", "text": "n${.n}-${b}"},
        "b": "${a.n}",
        "c": "${a}",
        "d": ["${b}", "x"],
    }
    assert resolved(tree) == {
        "a.n": 4,
        "a.twice": 8,
        "a.text": "n4-4",
        "b": 4,
        "c.n": 4,
        "c.twice": 8,
        "c.text": "n4-4",
        "d": [4, "x"],
    }


def test_unknown_interpolations_are_named() -> None:
    (setting,) = settings_of({"a": "${now:%Y}/${gone.key}"}, "c.yaml")
    assert (setting.value, setting.unknown) == ("${now:%Y}/${gone.key}", ("${now:%Y}", "${gone.key}"))


def test_interpolations_without_an_end_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"[ab]: interpolations that name one another"):
        settings_of({"a": "${b}", "b": "${a}"}, "c.yaml")


def test_numbers_are_omegaconfs(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("a: 1e-6\nb: 1.0e-06\nc: 5\nd: 1.5.2\ne: on\n")
    assert load_tree(tmp_path / "c.yaml") == {"a": 1e-6, "b": 1e-6, "c": 5, "d": "1.5.2", "e": True}


@pytest.mark.parametrize(
    ("text", "message"), [("- 1", "a list at the top"), ("a: [1", "no YAML"), ("a: !!python/name:os.system", "no YAML")]
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_tree(tmp_path / "c.yaml")
