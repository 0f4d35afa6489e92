"""A policy's arguments: JSON or a bare text, and what does not fit the schema."""

from __future__ import annotations

import pytest

from dapo_mcore.errors import ToolError
from dapo_mcore.tools.arguments import Arguments

CODE = Arguments("python", {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]})
SEARCH = Arguments(
    "search",
    {
        "type": "object",
        "properties": {"query": {"type": "string"}, "top": {"type": "integer", "enum": [1, 3]}},
        "required": ["query"],
        "additionalProperties": False,
    },
)


@pytest.mark.parametrize("text", ["print(1)", "1", "[1]", "{1: 2}", "null", '"quoted"'])
def test_a_text_is_the_only_argument(text: str):
    assert CODE.read(text) == CODE.read(text, is_code=True) == {"code": text}


@pytest.mark.parametrize("text", ['{"a": 1}', '{"code": "1"}'])
def test_code_that_is_a_json_object_is_code(text: str):
    assert CODE.read(text, is_code=True) == {"code": text}


def test_json_is_read():
    assert CODE.read('{"code": "1\n2"}') == {"code": "1\n2"}
    with pytest.raises(ValueError, match="'code' is a required property"):
        CODE.read('{"a": 1}')
    assert SEARCH.read('{"query": "x", "top": 3}') == {"query": "x", "top": 3}
    assert SEARCH.read({"query": "x"}) == {"query": "x"}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("{", "they are no JSON: "),
        ("[1]", "they are a JSON list instead of an object"),
        ({}, "'query' is a required property"),
        ({"query": 1}, "query: 1 is not of type 'string'"),
        ({"query": "x", "top": 2}, r"top: 2 is not one of \[1, 3\]"),
        ({"query": "x", "topp": 1}, "Additional properties are not allowed"),
        ({"query": ["x" * 10_000]}, "…$"),
        ("[" * 100_000, "they are no JSON"),
    ],
)
def test_what_does_not_fit_is_told_in_one_short_line(arguments, reason: str):
    with pytest.raises(ValueError, match=reason) as error:
        SEARCH.read(arguments)
    assert len(str(error.value)) <= 310 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "nonsense"}, "is no JSON schema: $.type: 'nonsense' is no type; the types are string, number, integer, "
         "boolean, array, object, null, or a list of them"),
        ({"properties": {"a": {"type": ["string", "text"]}}}, "is no JSON schema: $.properties.a.type: "
         "['string', 'text'] is no type; the types are string, "),
        ({"properties": {"type": {"enum": 3}}}, "is no JSON schema: $.properties.type.enum: 3 is not of type 'array'"),
        ({"properties": {"query": {}, "top": {}}, "required": ["query", "tops"]},
         "requires 'tops', which is not among its properties (query, top); did you mean 'top'?"),
        ({"required": ["query"]}, "requires 'query', which is not among its properties (none)"),
    ],
)  # fmt: skip
def test_a_schema_that_cannot_work_is_refused(schema: dict, reason: str):
    with pytest.raises(ToolError) as error:
        Arguments("t", schema)
    assert str(error.value).startswith(f"tools: t.parameters {reason}")
