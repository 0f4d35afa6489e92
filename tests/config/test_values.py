"""Types of fields: paths, names, patterns, and what every section refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from dapo_mcore.config.file import load_config, parse_config
from dapo_mcore.config.values import AnswerPattern, FilePath, Name, PromptTemplate, ResumeChoice, Section


def test_paths_are_expanded_as_by_a_shell(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    overrides = [
        "model.path=~/m",
        "data.files=[$DATA/a.jsonl, x$DATA]",
        "output_dir=${DATA}/runs",
        "data.system_prompt=~ $X",
    ]
    overrides += ["reward.function=~/r.py:f", "data.chat_template=~/t.jinja", "eval.sets={a: {files: ~/e.jsonl}}"]
    overrides += ["rollout.sglang.key_file=~/k", "rollout.sglang.python=~/p", "rollout.sglang.sync_dir=~/s"]
    overrides += ["warm_start={files: [$DATA/w]}"]
    c = load_config(file, overrides)
    assert (c.model.path, c.data.files, c.output_dir) == ("/home/me/m", ["/data/a.jsonl", "x/data"], "/data/runs")
    assert (c.reward.function, c.data.chat_template) == ("/home/me/r.py:f", "/home/me/t.jinja")
    assert (c.eval.sets["a"].files, c.warm_start and c.warm_start.files) == (["/home/me/e.jsonl"], ["/data/w"])
    s = c.rollout.sglang
    assert (s.key_file, s.python, s.sync_dir) == ("/home/me/k", "/home/me/p", "/home/me/s")
    assert c.data.system_prompt == "~ $X"


def test_a_configuration_cannot_be_changed() -> None:
    config = parse_config({"model": {"path": "model"}, "data": {"files": ["train.jsonl"]}})
    with pytest.raises(ValidationError, match="frozen"):
        config.algo.clip_high = 0.5
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1


def read(kind: Any, value: Any) -> Any:
    return TypeAdapter(kind).validate_python(value)


@pytest.mark.parametrize("name", ["a", "run-1", "0.5_b", "x" * 128])
def test_a_name_may_be_that_of_a_folder(name: str) -> None:
    assert read(Name, name) == name


@pytest.mark.parametrize("name", ["", ".hidden", "-x", "a/b", "a b", "é", "x" * 129])
def test_a_name_that_is_no_folders_is_refused_with_its_length(name: str) -> None:
    with pytest.raises(ValidationError, match=f"this one has {len(name)} characters"):
        read(Name, name)


def test_a_part_of_a_path_has_at_most_255_bytes() -> None:
    assert read(FilePath, "é" * 127 + "/" + "x" * 255) == "é" * 127 + "/" + "x" * 255
    with pytest.raises(ValidationError, match="longest part has 256"):
        read(FilePath, "a/" + "é" * 128)
    with pytest.raises(ValidationError, match="longest part has 3"):
        read(FilePath, "a\0b")


def test_a_pattern_has_a_group_and_a_template_a_place_for_the_prompt() -> None:
    assert read(AnswerPattern, "#### (.+)") == "#### (.+)"
    assert read(PromptTemplate, "Q: {prompt}") == "Q: {prompt}"
    for kind, value in ((AnswerPattern, "####"), (AnswerPattern, "("), (PromptTemplate, "Q: {question}")):
        with pytest.raises(ValidationError):
            read(kind, value)


class Example(Section):
    number: float = 1.0
    count: int | None = 2
    text: str | None = None
    flag: bool = False


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"number": True}, "true and false are no numbers; set a number"),
        ({"count": False}, "only null turns it off"),
        ({"text": "None"}, "only null turns it off"),
        ({"text": "off"}, "only null turns it off"),
        ({"number": float("inf")}, "finite number"),
        ({"other": 1}, "Extra inputs"),
    ],
)
def test_a_section_refuses_values_that_yaml_or_pydantic_would_take_for_others(values: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Example(**values)


def test_null_unsets_a_value_and_false_is_one_of_a_flag() -> None:
    assert Example(count=None, text=None, flag=False).model_dump() == {
        "number": 1.0,
        "count": None,
        "text": None,
        "flag": False,
    }


@pytest.mark.parametrize(
    ("value", "expected"),
    [("auto", "auto"), ("never", "never"), (12, 12), ("12", 12), (0, 0), ("a/step_000003", "a/step_000003")],
)
def test_a_checkpoint_is_chosen_by_a_word_a_step_or_a_path(value: Any, expected: int | str) -> None:
    assert read(ResumeChoice, value) == expected


@pytest.mark.parametrize("value", ["newest", "", "step_000003", -1, 12.5, True, False, None])
def test_any_other_choice_of_a_checkpoint_is_refused_in_one_line(value: Any) -> None:
    with pytest.raises(ValidationError, match=r"auto, never, the number of a rollout step") as caught:
        read(ResumeChoice, value)
    assert len(caught.value.errors()) == 1
