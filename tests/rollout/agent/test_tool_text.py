"""Tool output as tokens: plain text inside the text of the chat template or of the configuration."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dapo_mcore.data.chat import PromptRenderer
from dapo_mcore.errors import ConfigError
from dapo_mcore.rollout.agent.tool_text import PlainText, ToolText, open_tool_text
from tests.rollout.agent.talk import (
    AFTER,
    BEFORE,
    BYTES,
    CONTROL,
    EOS,
    QWEN,
    TAGS,
    TEMPLATE,
    ids,
    make_tokenizer,
    text_of,
)
from tests.rollout.sampling.scripted import make_config

SCHEMAS = [{"type": "function", "function": {"name": "python", "description": "runs code", "parameters": {}}}]


def opened(tokenizer: Any = QWEN, schemas: list[dict[str, Any]] = SCHEMAS, chat: Any = True, **agent: Any) -> ToolText:
    config = make_config("none", train=1)
    data = config.data.model_copy(update={"chat_template": chat})
    agent_config = type(config.agent).model_validate(agent)
    config = config.model_copy(update={"data": data, "agent": agent_config})
    return open_tool_text(config, tokenizer, schemas, stops=(EOS,))


@pytest.mark.parametrize("name", [*CONTROL, *TAGS])
def test_names_of_control_tokens_in_an_output_stay_text(name: str):
    text = f"before{name}after {name}{name}"
    tokens = PlainText(QWEN).encode(text)
    assert not set(tokens.tolist()) & set(QWEN.added_tokens_decoder)
    assert text_of(tokens) == text


def test_names_that_overlap_stay_text_too():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|a|>", "|><|b|>"])
    tokens = PlainText(tokenizer).encode("<|a|><|b|>")
    assert not set(tokens.tolist()) & set(tokenizer.added_tokens_decoder)
    assert text_of(tokens, tokenizer) == "<|a|><|b|>"


def test_indentation_stays_a_token_where_the_vocabulary_adds_it():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["    "])
    assert (
        PlainText(tokenizer).encode("    x").tolist() == ids("    x", tokenizer) and len(ids("    x", tokenizer)) == 2
    )


def test_other_text_is_encoded_as_ever():
    text = "x = `1`\n```\nα 😀"
    assert PlainText(QWEN).encode(text).tolist() == ids(text)
    assert text_of(PlainText(QWEN).encode("\ud800")) == "?"


def test_the_chat_template_gives_the_text_around_an_output():
    text = opened()
    assert text.ends_turn
    assert text.encode("2", last=0).tolist() == ids(f"{BEFORE}2{AFTER}")


def test_the_chat_template_has_the_variables_of_the_training_data():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("+ m.content + '\\n</tool", "+ m.content + mark + '\\n</tool")
    config = make_config("none", train=1)
    data = config.data.model_copy(update={"chat_template": True, "chat_template_kwargs": {"mark": "#"}})
    text = open_tool_text(config.model_copy(update={"data": data}), tokenizer, SCHEMAS, stops=(EOS,))
    assert text.encode("2", last=0).tolist() == ids(f"{BEFORE}2#{AFTER}", tokenizer)


def test_an_empty_thought_opens_each_turn_where_thinking_is_off(real_data):
    """Qwen3's template leaves it out of earlier turns; the policy's turns, to which outputs are only appended, keep it."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = real_data("qwen/qwen3.jinja").read_text()
    config = make_config("none", train=1)
    for variables, opening in (({}, ""), ({"enable_thinking": False}, "<think>\n\n</think>\n\n")):
        data = config.data.model_copy(update={"chat_template": True, "chat_template_kwargs": variables})
        text = open_tool_text(config.model_copy(update={"data": data}), tokenizer, SCHEMAS, stops=(EOS,))
        assert text.encode("2", last=0).tolist() == ids(f"{BEFORE}2{AFTER}{opening}", tokenizer)
        assert PromptRenderer(data, tokenizer).render("Q", "row 1")[0].endswith(f"assistant\n{opening}")


def test_the_token_that_ends_the_policys_turn_is_not_repeated():
    assert opened().encode("2", last=EOS).tolist() == ids(f"{BEFORE}2{AFTER}")[1:]


def test_outputs_stand_in_tags_where_there_is_no_chat():
    tags, blocks = opened(chat=False), opened(tokenizer=BYTES, call_format="code_block")
    assert not tags.ends_turn and not blocks.ends_turn
    assert tags.encode("2", last=EOS).tolist() == ids("\n<tool_response>\n2\n</tool_response>\n")
    assert text_of(blocks.encode("2", last=0), BYTES) == "\n<interpreter>\n2\n</interpreter>\n"


def test_a_template_of_the_configuration_comes_first():
    text = opened(output_template="<|im_end|>[{output}]<|im_start|>")
    assert text.ends_turn and text.encode("2", last=0).tolist() == ids("<|im_end|>[2]<|im_start|>")


def test_a_long_output_loses_its_middle():
    text = ToolText(QWEN, "(", ")", most=60, stops=())
    tokens = text.encode("a" * 100 + "b" * 100, last=0)
    assert len(tokens) == 62
    assert text_of(tokens) == "(" + "a" * 18 + "\n[140 tokens left out]\n" + "b" * 19 + ")"
    assert text_of(text.encode("c" * 60, last=0)) == f"({'c' * 60})"
    assert len(ToolText(QWEN, "", "", most=3, stops=()).encode("a" * 9, last=0)) == 3


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (TEMPLATE.replace("if tools", "if false"), "data.chat_template does not declare tools"),
        (
            TEMPLATE.replace("<|im_start|>assistant\\n' }}", "<|im_start|>assistant\\n<think>' }}").replace(
                "m.content + '<|im_end|>", "m.content.split('</think>')[-1] + '<|im_end|>"
            ),
            "does not append",
        ),
        (TEMPLATE.replace("m.content + '<|im_end|>", "m.content[-40:] * 0 + '<|im_end|>"), "does not append"),
        (
            TEMPLATE.replace(
                "{%- else %}", "{%- elif m.role == 'assistant' and loop.index0 + 2 < messages|length %}{%- else %}"
            ),
            "rewrites an earlier turn",
        ),
        ("{{ raise_exception('no tools here') }}", "refuses a tool's message: no tools here"),
    ],
)
def test_a_template_that_does_not_fit_is_refused_with_a_remedy(template: str, problem: str):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=problem) as error:
        opened(tokenizer)
    assert "set agent." in str(error.value) and "\n" not in str(error.value)


def test_a_template_that_begins_turns_with_a_thought_is_accepted_if_it_keeps_thoughts():
    """As Qwen3's thinking models: the prompt for a turn ends with <think>, and an earlier turn has its thought."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace(
        "'<|im_start|>' + m.role + '\\n'",
        "'<|im_start|>' + m.role + '\\n' + ('<think>\\n' if m.role == 'assistant' else '')",
    ).replace("'<|im_start|>assistant\\n' }}", "'<|im_start|>assistant\\n<think>\\n' }}")
    assert opened(tokenizer).encode("2", last=0).tolist() == ids(f"{BEFORE}2{AFTER}<think>\n")


def test_declared_tools_are_not_needed_if_the_configuration_says_so():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("if tools", "if false")
    assert np.array_equal(opened(tokenizer, schemas=[]).encode("2", last=0), opened().encode("2", last=0))
