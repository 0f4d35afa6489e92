"""YAML as its authors mean it: text stays text, numbers are numbers, and nothing is lost silently."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dapo_mcore.config.file import load_config
from dapo_mcore.config.yaml_text import read_yaml
from dapo_mcore.errors import ConfigError


@pytest.mark.parametrize(
    ("override", "value"),
    [("optimizer.lr=1e-6", 1e-6), ("optimizer.lr=3E-4", 3e-4), ("optimizer.lr=.5e-3", 5e-4), ("optimizer.lr=1", 1.0)],
)
def test_overrides_read_numbers_as_people_write_them(file: Path, override: str, value: float) -> None:
    lr = load_config(file, [override]).optimizer.lr
    assert isinstance(lr, float)
    assert lr == value


def test_scientific_notation_is_a_number_where_any_type_is_allowed(file: Path) -> None:
    config = load_config(file, ["megatron.layernorm_epsilon=1e-6"])
    assert config.megatron == {"layernorm_epsilon": 1e-6}


TEXTS = [
    ("data.answer_pattern", "#### (.+)"),
    ("data.prompt_template", "{prompt} Think step by step."),
    ("data.prompt_template", "Question: {prompt} # show your work"),
    ("data.system_prompt", "End with #### and the number: no more"),
    ("data.system_prompt", "'a' or 'b'"),
    ("data.answer_key", "yes"),
    ("name", "20250101"),
    ("name", "1e5"),
    ("algo.tis.mode", "off"),
    ("rollout.sglang.verify_sync", "off"),
    ("observe.wandb_project", "2025-01-01"),
    ("data.chat_template", "[a].jinja"),
]


@pytest.mark.parametrize(("key", "text"), TEXTS)
def test_a_text_is_taken_as_it_stands(file: Path, key: str, text: str) -> None:
    config: Any = load_config(file, ["data.chat_template=true", f"{key}={text}"])
    for part in key.split("."):
        config = getattr(config, part)
    assert config == text


def test_a_text_may_be_null_and_yaml_reads_quotes_around_the_whole_text(file: Path) -> None:
    data = load_config(file, ["data.source_key=null", r'data.prompt_template="Q: {prompt}\nA:"']).data
    assert (data.source_key, data.prompt_template) == (None, "Q: {prompt}\nA:")
    assert load_config(file, ["data.source_key='null'"]).data.source_key == "null"


@pytest.mark.parametrize(
    ("value", "template"),
    [("true", True), ("False", False), ("a #1.jinja", "a #1.jinja"), ("null.jinja", "null.jinja")],
)
def test_a_chat_template_is_a_truth_value_or_a_path(file: Path, value: str, template: bool | str) -> None:
    assert load_config(file, [f"data.chat_template={value}"]).data.chat_template == template


def test_files_are_one_path_as_it_stands_or_a_list(file: Path) -> None:
    assert load_config(file, ["data.files=a #1: b.jsonl"]).data.files == ["a #1: b.jsonl"]
    assert load_config(file, ["data.files=[a.jsonl, 20250101]"]).data.files == ["a.jsonl", "20250101"]


def test_a_plain_value_in_a_file_is_text_where_text_belongs(tmp_path: Path) -> None:
    path = written(tmp_path, "name: 20250101", "algo: {tis: {mode: off}}", "eval: {sets: {2024: {files: a.jsonl}}}")
    config = load_config(path)
    assert (config.name, config.algo.tis.mode, list(config.eval.sets)) == ("20250101", "off", ["2024"])


def written(folder: Path, *lines: str) -> Path:
    path = folder / "written.yaml"
    path.write_text("\n".join(["model: {path: x}", *lines]) + "\n", encoding="utf-8")
    if not any(line.startswith("data:") for line in lines):
        path.write_text(path.read_text() + "data: {files: y}\n", encoding="utf-8")
    return path


def test_a_comment_that_cuts_a_text_short_is_refused_and_other_comments_are_ignored(tmp_path: Path) -> None:
    cut = written(tmp_path, "data:", "  files: y  # the file", "  system_prompt: End with #### and the number")
    with pytest.raises(
        ConfigError, match=r"line 4: YAML takes '#### and the number' after data.system_prompt for a com"
    ):
        load_config(cut)
    for gone in ("  answer_pattern: #### (.+)", "  source_key:\n    # no such column"):
        with pytest.raises(ConfigError, match=r"quote the whole text if .* on a line of its own and write null"):
            load_config(written(tmp_path, "data:", "  files: y", gone))
    fine = written(
        tmp_path,
        "# c",
        "name: a # c",
        "seed: 3 # c",
        "data:",
        "  # c",
        "  files: y # c",
        '  answer_pattern: "# (.)" # c',
    )
    config = load_config(fine)
    assert (config.name, config.seed, config.data.answer_pattern) == ("a", 3, "# (.)")


def test_a_key_given_twice_names_both_lines_at_any_depth(tmp_path: Path) -> None:
    for lines, message in (
        (
            ["data: {files: y}", "data:", "  files: z"],
            "written.yaml gives data twice, in lines 2 and 3; keep one of them",
        ),
        (["optimizer:", "  lr: 1e-6", "  lr: 5e-3"], "gives optimizer.lr twice, in lines 3 and 4"),
        (["megatron:", "  a: [{b: 1,", "   b: 2}]"], "gives megatron.a.b twice, in lines 3 and 4"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            load_config(written(tmp_path, *lines))


def test_an_override_does_not_change_an_alias_of_what_it_changes(tmp_path: Path) -> None:
    path = written(tmp_path, "data: &d", "  files: y", "eval: {sets: {a: *d, b: {<<: *d, limit: 3}}}")
    config = load_config(path, ["data.limit=5"])
    assert (config.data.limit, config.eval.sets["a"].limit, config.eval.sets["b"].limit) == (5, None, 3)


def test_a_plain_value_is_read_as_its_type_asks() -> None:
    assert read_yaml("20250101", "here", str) == "20250101"
    assert read_yaml("20250101", "here", int) == 20250101
    assert read_yaml("1e-6", "here", Any) == 1e-6
    assert read_yaml("2025-01-01", "here", Any) == "2025-01-01"
    assert read_yaml("", "here", Any) is None


@pytest.mark.parametrize("text", ["010", "1:30"])
def test_numbers_of_another_base_are_refused_with_their_line(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"here line 2: YAML reads {text} in base 8 or 60"):
        read_yaml(f"# one\n{text}", "here", int)


def test_aliases_are_copies() -> None:
    found = read_yaml("{a: &x [1], b: *x}", "here", Any)
    assert found == {"a": [1], "b": [1]} and found["a"] is not found["b"]
