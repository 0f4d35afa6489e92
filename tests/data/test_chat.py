"""Prompts to text and tokens."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest

from dapo_mcore.config.sections import DataConfig
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


def test_prompts_that_are_no_text(tokenizer):
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
def test_settings_that_contradict(tokenizer, settings, message):
    with pytest.raises(ConfigError, match=message):
        render(tokenizer, "hi", **settings)


def test_bos_needs_a_tokenizer_with_bos(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = None
    with pytest.raises(ConfigError, match="no BOS token"):
        render(tokenizer, "hi", add_bos=True)
