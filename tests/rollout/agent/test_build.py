"""What a configuration with tools gives to prompts, engine and episodes. The tools are real ones."""

from __future__ import annotations

import threading
from contextlib import closing
from types import SimpleNamespace

import pytest

from dapo_mcore.config.schema import Config
from dapo_mcore.data.chat import PromptRenderer
from dapo_mcore.data.stops import Stops
from dapo_mcore.errors import ConfigError
from dapo_mcore.rollout.agent.build import open_agent, tokens_with
from dapo_mcore.rollout.agent.engine import ContinuousToolEngine, RoundToolEngine
from tests.rollout.agent.letters import ContinuousPolicy
from tests.rollout.agent.talk import (
    AFTER,
    BEFORE,
    BYTES,
    EOS,
    PROMPT,
    QWEN,
    ids,
    make_tokenizer,
    params,
    stopped,
    text_of,
)

STOPS = Stops((EOS,), None, "")
CALL = '<tool_call>{"name": "sum", "arguments": {"expression": "6 * 7"}}</tool_call>'
SUM = {"name": "sum", "function": "calculator", "description": "adds"}


def configured(*, chat: bool = True, **agent: object) -> Config:
    tree = {"model": {"path": "m"}, "data": {"files": ["f"], "chat_template": chat}, "tools": [SUM], "agent": agent}
    return Config.model_validate(tree)


def test_without_tools_the_engine_answers():
    config = Config.model_validate({"model": {"path": "m"}, "data": {"files": ["f"]}})
    engine = SimpleNamespace()
    with closing(open_agent(config, QWEN, STOPS)) as agent:
        assert agent.on(engine) is engine and not agent.schemas and not agent.end_tokens


def test_a_policy_calls_the_calculator_and_reads_its_result():
    asked: list[list[int]] = []

    def generate(prompts, law, limits):
        asked.extend(prompt.tolist() for prompt in prompts)
        turn = ids("42<|im_end|>") if len(asked) > 1 else ids(CALL)
        return [stopped(turn, (EOS, *agent.end_tokens), law.max_new_tokens)]

    with closing(open_agent(configured(), QWEN, STOPS)) as agent:
        assert agent.end_tokens == ids("</tool_call>")
        text, prompt = PromptRenderer(configured().data, QWEN, tools=agent.schemas).render("6 * 7?", "row 1")
        assert '"name": "sum"' in text and '"description": "adds"' in text
        made = agent.on(SimpleNamespace(generate=generate, metrics=dict))
        assert isinstance(made, RoundToolEngine)
        (rollout,) = made.generate([prompt], params())
    assert text_of(rollout.token_ids) == f"{CALL}{BEFORE}42{AFTER}42<|im_end|>"
    assert [(call.name, call.kind, call.output) for call in rollout.calls] == [("sum", "ok", "42")]
    assert asked[1] == [*prompt, *rollout.token_ids[: len(asked[1]) - len(prompt)]]


@pytest.mark.parametrize(
    ("call_format", "turn", "output"),
    [
        ("tool_call", '<tool_call>{"name": "sum", "arguments": {"expr": "1"}}</tool_call>', "the arguments do not fit sum: "),
        ("code_block", '```python\n{"expression": "6 * 7"}\n```', "ValueError: \"{'expression': '6 * 7'}\" is not arithmetic"),
    ],
)  # fmt: skip
def test_json_in_tags_is_arguments_and_code_in_a_block_is_code(call_format: str, turn: str, output: str):
    left = ids(turn)

    def generate(prompts, law, limits):
        made = stopped(left, (EOS, *agent.end_tokens), law.max_new_tokens)
        del left[: len(made.token_ids)]
        return [made]

    with closing(open_agent(configured(call_format=call_format, max_turns=2), QWEN, STOPS)) as agent:
        (rollout,) = agent.on(SimpleNamespace(generate=generate, metrics=dict)).generate([PROMPT], params())
    assert rollout.calls[0].kind == "error" and rollout.calls[0].output.startswith(output)


def test_a_continuous_engine_gets_episodes_that_overlap():
    with closing(open_agent(configured(), QWEN, STOPS)) as agent:
        made = agent.on(ContinuousPolicy({}))
        assert isinstance(made, ContinuousToolEngine)
        made.close()


@pytest.mark.parametrize(
    ("chat", "agent"),
    [(False, {}), (True, {"declare_tools": False}), (True, {"call_format": "code_block"})],
)
def test_tools_are_not_declared_without_a_chat_or_a_format_of_names(chat: bool, agent: dict[str, object]):
    with closing(open_agent(configured(chat=chat, **agent), QWEN, STOPS)) as opened:
        assert opened.schemas == ()


def test_tokens_that_close_a_call_are_found_in_the_vocabulary():
    assert tokens_with(BYTES, "```") == sorted({*ids("```", BYTES), *ids("```\n", BYTES), *ids("\n```", BYTES)})
    assert tokens_with(BYTES, "</tool_call>") == []


def test_a_template_that_cannot_be_used_is_refused_and_leaves_no_tool_behind():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(ConfigError, match="does not declare tools"):
        open_agent(configured(), tokenizer, STOPS)
    assert "tools" not in [thread.name for thread in threading.enumerate()]


def test_a_token_that_ends_responses_is_no_end_of_a_call():
    with closing(open_agent(configured(), QWEN, Stops((EOS, *ids("</tool_call>")), None, ""))) as agent:
        assert len(agent.end_tokens) == 0
