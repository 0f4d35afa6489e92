"""Rendering of prompts to text and tokens, by templates that may fail in many ways."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from dapo_mcore.config.data import DataConfig
from dapo_mcore.data import chat
from dapo_mcore.data.chat import PromptRenderer
from dapo_mcore.errors import ConfigError, DataError

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[bot]{% endif %}"
)


@pytest.fixture
def jinja(tmp_path: Path) -> str:
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    return str(tmp_path / "chat.jinja")


def render(tokenizer, prompt, **settings):
    return PromptRenderer(DataConfig(files=["f"], **settings), tokenizer).render(prompt, "f row 1")


def test_plain_text(tokenizer):
    text, ids = render(tokenizer, "ab")
    assert text == "ab"
    assert ids.dtype == np.int32
    assert ids.tolist() == [70, 71]


def test_plain_text_in_a_template_with_bos(tokenizer):
    text, ids = render(tokenizer, "{x}", prompt_template="Q:{prompt}\n", add_bos=True)
    assert text == "Q:{x}\n"
    assert ids.tolist() == [2, *tokenizer.encode("Q:{x}\n", add_special_tokens=False)]


def test_text_becomes_a_user_message(tokenizer, jinja):
    text, ids = render(tokenizer, "hi", chat_template=jinja, prompt_template="{prompt}!", system_prompt="be kind")
    assert text == "[system]be kind[user]hi![bot]"
    assert tokenizer.decode(ids) == text


def test_a_chat_keeps_its_own_system_message(tokenizer, jinja):
    chat = [{"role": "system", "content": "own"}, {"role": "user", "content": "hi"}]
    text, _ = render(tokenizer, chat, chat_template=jinja, system_prompt="other", prompt_template="{prompt}!")
    assert text == "[system]own[user]hi[bot]"


def test_a_template_gets_the_sections_variables(tokenizer, write_template):
    source = (
        "{{ messages[0].content }}{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    )
    settings = {"chat_template": write_template(source)}
    assert render(tokenizer, "hi", **settings)[0] == "hi"
    assert (
        render(tokenizer, "hi", chat_template_kwargs={"enable_thinking": False}, **settings)[0] == "hi<think></think>"
    )
    with pytest.raises(
        ConfigError, match=r"data.chat_template_kwargs has thinking, which the chat template does not read"
    ):
        render(tokenizer, "hi", chat_template_kwargs={"thinking": False}, **settings)


def test_the_tokenizers_own_template(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    assert render(tokenizer, "hi", chat_template=True)[0] == "[user]hi[bot]"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (7, "must be text or a non-empty list"),
        ([], "non-empty"),
        (["hi"], "message 1 must be"),
        ([{"role": "user"}], "message 1 must have text under 'content'"),
        ([{"role": "user", "content": None}], "got None"),
        ([{"content": "hi"}], "under 'role'"),
        ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}], "ends with an assistant"),
    ],
)
def test_a_broken_chat_names_the_row(tokenizer, jinja, prompt, message):
    with pytest.raises(DataError, match="f row 1: ") as error:
        render(tokenizer, prompt, chat_template=jinja)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no system role') }}", "{% if %}", "{{ messages[3].content }}"]
)
def test_a_template_that_fails_names_the_row(tokenizer, tmp_path, template):
    (tmp_path / "t.jinja").write_text(template)
    with pytest.raises(DataError, match="f row 1: the chat template refused"):
        render(tokenizer, "hi", chat_template=str(tmp_path / "t.jinja"))


def test_prompts_that_are_not_text_are_refused(tokenizer):
    with pytest.raises(DataError, match=r"f row 1: the prompt is a list.*chat_template true"):
        render(tokenizer, [{"role": "user", "content": "hi"}])
    with pytest.raises(DataError, match="f row 1: the prompt has no tokens"):
        render(tokenizer, "", add_bos=True)
    with pytest.raises(DataError, match="f row 1: the text cannot be tokenized"):
        render(tokenizer, "half a pair: \ud800")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chat_template": True}, "the tokenizer has none"),
        ({"chat_template": "absent.jinja"}, "is not a file"),
    ],
)
def test_a_template_that_does_not_exist_is_refused(tokenizer, settings, message):
    with pytest.raises(ConfigError, match=message):
        render(tokenizer, "hi", **settings)


def test_bos_needs_a_tokenizer_with_bos(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = None
    with pytest.raises(ConfigError, match="no BOS token"):
        render(tokenizer, "hi", add_bos=True)


GOOD = b'{"q": "x", "a": 1}\n'

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"


RECURSION = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}"


@pytest.mark.parametrize("source", [LOOP, RECURSION])
def test_a_template_that_never_ends_is_stopped(load_file, write_template, monkeypatch, source: str):
    monkeypatch.setattr(chat, "TEMPLATE_CPU_S", 0.1)
    with pytest.raises(ConfigError, match=r"data.chat_template has not ended after 0.1 s of CPU time on .* row 1"):
        load_file("f.jsonl", GOOD, chat_template=write_template(source), on_bad_row="skip")


def test_a_template_that_explodes_is_stopped_before_it_is_tokenized(load_file, write_template):
    with pytest.raises(
        DataError, match="row 1: the chat template made 10,000,001 characters of the prompt, more than 10,000,000;"
    ):
        load_file("f.jsonl", GOOD, chat_template=write_template("{{ messages[0].content * 10000001 }}"))


@pytest.mark.parametrize(
    "source", ["{{ 1 // 0 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ range(10**9) }}"]
)
def test_any_error_inside_a_template_names_the_row(load_file, write_template, source: str):
    with pytest.raises(DataError, match="row 1: the chat template refused the prompt: ") as error:
        load_file("f.jsonl", GOOD, chat_template=write_template(source))
    assert "\n" not in str(error.value)


def test_a_message_that_the_template_leaves_out_is_refused(load_file, write_template):
    source = (
        "{% for m in messages %}{% if m.role in ('user', 'assistant') %}[{{ m.content|upper }}]{% endif %}{% endfor %}"
    )
    row = {"q": [{"role": "user", "content": "a"}, {"role": "humen", "content": "b"}], "a": 1}
    with pytest.raises(
        DataError, match=r"row 1: the chat template leaves out message 2, whose role is 'humen'; correct"
    ):
        load_file("f.jsonl", json.dumps(row).encode(), chat_template=write_template(source))
    row["q"][1]["role"] = "user"
    assert (
        load_file("f.jsonl", json.dumps(row).encode(), chat_template=write_template(source)).prompts[0].text == "[A][B]"
    )


def test_named_templates_are_chosen_by_name(load_file, tokenizer, monkeypatch):
    named = {"plain": "{{ messages[0].content }}", "tool_use": "T{{ messages[0].content }}"}
    monkeypatch.setattr(tokenizer, "chat_template", named)
    with pytest.raises(
        ConfigError, match=r"none of the tokenizer's templates is named default; set .* plain, tool_use"
    ):
        load_file("f.jsonl", GOOD, chat_template=True)
    assert load_file("f.jsonl", GOOD, chat_template="tool_use").prompts[0].text == "Tx"
    with pytest.raises(
        ConfigError, match=r"'other' is not a file; .*, or one of the tokenizer's templates: plain, tool_use"
    ):
        load_file("f.jsonl", GOOD, chat_template="other")
    monkeypatch.setattr(tokenizer, "chat_template", {**named, "default": "D{{ messages[0].content }}"})
    assert load_file("f.jsonl", GOOD, chat_template=True).prompts[0].text == "Dx"


def test_a_template_file_that_cannot_be_read_as_utf8_is_refused(load_file, tmp_path: Path):
    (tmp_path / "t.jinja").write_bytes(b"\xff\xfe{")
    for path in (tmp_path / "t.jinja", tmp_path):
        with pytest.raises(ConfigError, match=r"cannot be read: .*; give a Jinja file in UTF-8"):
            load_file("f.jsonl", GOOD, chat_template=str(path))
