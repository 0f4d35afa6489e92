"""How a policy calls tools: the settings, and the rules between them and the rest."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from dapo_mcore.config.schema import Config

TOOL = {"name": "python", "function": "python"}
OTHER = {"name": "sum", "function": "calculator"}


def configured(**sections: Any) -> Config:
    return Config.model_validate({"model": {"path": "m"}, "data": {"files": ["f"]}, **sections})


def test_tools_with_their_defaults_and_other_settings_are_accepted():
    assert configured(tools=[TOOL, OTHER]).agent.call_format == "tool_call"
    changed = configured(tools=[TOOL], agent={"call_format": "code_block", "output_template": "[{output}]"})
    assert changed.agent.output_template == "[{output}]"
    assert configured(tools=[], agent={"max_turns": 3}).tools == []


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"agent": {"max_turns": 3}}, "there are no tools: name some, or leave agent out"),
        ({"tools": [TOOL], "agent": {"max_turns": 1}}, "greater than or equal to 2"),
        ({"tools": [TOOL], "agent": {"output_template": "no place"}}, "must have {output} once, but has it 0 times"),
        ({"tools": [TOOL], "agent": {"output_template": "{output}{output}"}}, "but has it 2 times"),
        ({"tools": [TOOL, OTHER], "agent": {"call_format": "code_block"}}, r"there are 2 \(python, sum\); leave one"),
        (
            {"tools": [TOOL], "eval": {"sets": {"held": {"files": ["f"], "chat_template": True}}}},
            "eval.sets.held.chat_template True differs from data.chat_template None",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(sections: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        configured(**sections)
