"""How a policy calls tools while it writes a response.

Change here: a setting of responses with tools. The tools themselves are in tools.py.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from dapo_mcore.config.values import Section, Text, Tokens

OUTPUT = "{output}"


class AgentConfig(Section):
    """Calls of `tools`. dapo_mcore/rollout/agent/README.md shows a response with a call."""

    call_format: Literal["tool_call", "code_block"] = "tool_call"
    """`tool_call`: JSON between <tool_call> and </tool_call>, as Qwen's and Hermes' chat templates write it. `code_block`: a block
    that begins with the line ```python and ends with the line ```, as in ReTool; its text is the argument of the only tool."""
    declare_tools: bool = True
    """Call format tool_call with data.chat_template: let the template declare the tools in each prompt. Else the policy knows of
    them by data.system_prompt, the data, or its training."""
    max_turns: int = Field(8, ge=2, le=1000)
    """Turns of the policy in one response. A call in the last one is not made; the response then counts as truncated."""
    max_output_tokens: Tokens = 2048
    """Tokens of one tool output; longer ones lose their middle. All of them also count in rollout.max_response_tokens. If an
    output does not fit there, the response ends at the call and counts as truncated."""
    output_template: Text | None = None
    """Text around a tool output, with {output}. Control tokens in it are control tokens; in the output they are plain text. null:
    call format tool_call with data.chat_template takes the template's own tool message; else <tool_response> and
    </tool_response> (tool_call) or <interpreter> and </interpreter> (code_block) stand around it."""

    @field_validator("output_template")
    @classmethod
    def _has_a_place_for_the_output(cls, template: str | None) -> str | None:
        if template is not None and template.count(OUTPUT) != 1:
            raise ValueError(f"output_template must have {OUTPUT} once, but has it {template.count(OUTPUT)} times")
        return template
