"""Rules of a table on runs of a few settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dapo_mcore.config.foreign_names import Name
from dapo_mcore.foreign.settings import ForeignRun, ForeignSetting
from dapo_mcore.foreign.table import Outcome, Rule, Source, Undecided, changed, lost, meaningless, run_name, same

NAMES = {"a.n": Name("rollout.group_size", "responses per prompt"), "t.freq": Name("eval.every", "rollout steps")}


def applied(rule: Rule, given: dict[str, Any], defaults: dict[str, Any] | None = None) -> list[Outcome]:
    settings = tuple(ForeignSetting(key, value, "run.sh line 1") for key, value in given.items())
    run = ForeignRun("verl", Path("run.sh"), "", "", settings)
    return list(rule.apply(Source(run, defaults or {})))


def test_a_value_that_stands_is_the_same() -> None:
    assert applied(same(NAMES, "a.n"), {"a.n": 16}) == [Outcome("same", ("a.n",), "rollout.group_size", 16)]


def test_the_sources_default_holds_where_the_run_says_nothing() -> None:
    assert applied(same(NAMES, "a.n"), {}, {"a.n": 1}) == [Outcome("same", ("a.n",), "rollout.group_size", 1)]
    assert applied(same(NAMES, "a.n"), {}) == []


def test_a_newer_name_wins_over_an_older_one() -> None:
    found = applied(same(NAMES, "a.n", "old.n"), {"old.n": 4})
    assert found == [Outcome("same", ("old.n",), "rollout.group_size", 4)]


def test_a_changed_value_says_how() -> None:
    rule = changed(NAMES, lambda value: value * 2, "t.freq")
    assert applied(rule, {"t.freq": 5}) == [Outcome("converted", ("t.freq",), "eval.every", 10, "rollout steps")]


def test_settings_without_a_meaning_are_found_by_pattern() -> None:
    rule = meaningless("sharding", "Megatron shards by itself", "a.fsdp.*")
    assert [outcome.sources for outcome in applied(rule, {"a.fsdp.size": 8, "a.n": 1})] == [("a.fsdp.size",)]


def test_a_lost_setting_counts_only_if_it_is_on() -> None:
    rule = lost("reward models", "rm.enable", objective=True)
    assert applied(rule, {"rm.enable": True}) == [Outcome("lost", ("rm.enable",), note="reward models", objective=True)]
    assert [outcome.kind for outcome in applied(rule, {"rm.enable": False})] == ["meaningless"]
    assert applied(rule, {}, {"rm.enable": False}) == []
    assert [outcome.kind for outcome in applied(rule, {}, {"rm.enable": True})] == ["lost"]


def test_a_name_gets_letters_that_a_folders_name_may_have() -> None:
    assert [(o.kind, o.value) for o in applied(run_name("t.name"), {"t.name": "qwen3-4B"})] == [("same", "qwen3-4B")]
    assert [(o.kind, o.value) for o in applied(run_name("t.name"), {"t.name": "-my run/7"})] == [
        ("converted", "my-run-7")
    ]
    assert applied(run_name("t.name"), {}) == []


def test_zero_is_not_false() -> None:
    assert [outcome.kind for outcome in applied(lost("x", "k"), {"k": 0})] == ["lost"]


def test_a_value_that_only_a_run_would_tell_is_undecided() -> None:
    setting = ForeignSetting("a.path", "${HOME_OF_MODELS}/7b", "run.sh line 1", unknown=("HOME_OF_MODELS",))
    source = Source(ForeignRun("verl", Path("run.sh"), "", "", (setting,)), {})
    with pytest.raises(Undecided, match=r"a\.path"):
        source["a.path"]
    assert source.path("a.path") == "${HOME_OF_MODELS}/7b"
