"""Which text is a call, and what a policy reads of one that cannot be made."""

from __future__ import annotations

import json

import pytest

from dapo_mcore.rollout.agent.call_format import Call, CodeBlocks, ToolCallTags

TAGS, BLOCKS = ToolCallTags(), CodeBlocks("python")


def call(inside: str) -> Call:
    found = TAGS.find(f"<think>hm</think>\n<tool_call>\n{inside}\n</tool_call>")
    assert found is not None and found.closed
    return found


def code(text: str) -> Call:
    return Call("python", text, is_code=True)


def test_json_in_tags_is_a_call_of_the_named_tool():
    found = call('{"name": "python", "arguments": {"code": "print(\\"é\\")"}}')
    assert found == Call("python", '{"code": "print(\\"é\\")"}')
    assert json.loads(found.arguments) == {"code": 'print("é")'}


def test_arguments_may_be_a_text_or_be_left_out():
    assert call('{"name": "calculator", "arguments": "1 + 1"}') == Call("calculator", "1 + 1")
    assert call('{"name": "now"}') == Call("now", "{}")


def test_code_may_have_its_line_breaks_as_they_are():
    assert json.loads(call('{"name": "python", "arguments": {"code": "x = 1\nprint(x)"}}').arguments) == {
        "code": "x = 1\nprint(x)"
    }


def test_the_first_of_two_calls_counts():
    assert TAGS.find('<tool_call>{"name": "a"}</tool_call><tool_call>{"name": "b"}</tool_call>').name == "a"


@pytest.mark.parametrize(
    ("inside", "problem"),
    [
        ('{"name": "python", "arguments": {"code": "1}', "the call is no JSON: Unterminated string"),
        ("print(1)", "the call is no JSON: Expecting value"),
        ("[" * 100_000, "the call is no JSON: "),
        ("[1]", "the call is not a JSON object with a name"),
        ('{"arguments": {}}', "the call is not a JSON object with a name"),
        ('{"name": 3}', "the call is not a JSON object with a name"),
        ('{"name": "python", "arguments": [1]}', "the arguments are not a JSON object"),
    ],
)
def test_a_call_that_cannot_be_read_says_what_to_write(inside: str, problem: str):
    found = call(inside)
    assert found.problem.startswith(problem) and found.problem.endswith('write {"name": …, "arguments": {…}}')


def test_half_a_surrogate_pair_becomes_a_question_mark():
    found = call('{"name": "\\ud800", "arguments": {"code": "\\udfff"}}')
    assert (found.name, found.arguments) == ("?", '{"code": "?"}')


@pytest.mark.parametrize("text", ["", "no call", "</tool_call>", "tool_call", "a < b > c"])
def test_text_without_a_tag_is_no_call(text: str):
    assert TAGS.find(text) is None


def test_a_call_is_closed_by_its_end_alone():
    text = 'x<tool_call>{"name": "python"}</tool_call>'
    begins = text.index("<tool_call>") + len("<tool_call>")
    for length in range(len(text) + 1):
        found = TAGS.find(text[:length])
        assert (found is not None) == (length >= begins)
        assert found is None or found.closed == (length == len(text))
        assert found is None or bool(found.problem) != found.closed


def test_the_code_of_a_block_is_the_argument_of_the_only_tool():
    text = "Let me see.\n```python\nx = 1\nprint(x)\n```\nand then"
    assert BLOCKS.find(text) == code("x = 1\nprint(x)\n")
    assert BLOCKS.find("```py\n1\n```") == code("1\n")
    assert BLOCKS.find("  ```Python \n1\n  ```") == code("1\n")


@pytest.mark.parametrize(
    "text",
    [
        "use `x` here",
        "```\nx\n```",
        "```text\n```\n",
        "```text\n```\nand ```python inside a line\n```",
        "```pythonic\nx\n```",
    ],
)
def test_other_blocks_are_text(text: str):
    assert BLOCKS.find(text) is None


def test_a_block_after_one_of_another_language_is_found():
    assert BLOCKS.find("```text\n1\n```\n```python\n2\n```") == code("2\n")


def test_a_block_is_closed_by_a_line_that_begins_with_the_fence():
    text = "```python\nprint('```')\n```"
    for length in range(len("```python"), len(text)):
        assert BLOCKS.find(text[:length]).closed is False
    assert BLOCKS.find(text) == code("print('```')\n")
    assert BLOCKS.find("```python\nx```").problem == "the code block has no closing ```, so it was not run; close it"
