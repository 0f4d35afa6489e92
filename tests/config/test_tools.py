"""The section `tools`: its defaults and its mistakes."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from dapo_mcore.config.tools import ToolConfig, check_names

OWN = {"name": "t", "function": "m:f", "parameters": {"type": "object"}}


def test_built_in_tools_need_only_a_name():
    tool = ToolConfig(name="python", function="python")
    assert (tool.timeout_s, tool.max_output_characters, tool.workers) == (30.0, 8192, None)
    assert tool.sandbox.preload == ["numpy", "sympy"] and tool.sandbox.mechanism == "auto"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"name": "two words"}, "a tool's name has 1 to 64 letters"),
        ({"name": "1st"}, "a tool's name"),
        ({"function": "pythn"}, "neither python nor calculator nor an import path"),
        ({"parameters": None}, "parameters is needed for a function of your own"),
        ({"parameters": {"type": "string"}}, "the JSON schema of an object, not of type 'string'"),
        ({"sandbox": {"memory_mib": 128}}, "sandbox is for function python"),
        ({"timeout_s": 0}, "greater than 0"),
        ({"placement": "ray"}, "placement ray needs workers"),
        ({"workers": 0}, "greater than or equal to 1"),
        ({"max_output_characters": 0}, "greater than or equal to 1"),
        ({"sandbox": {"mechanism": "none"}}, "'auto', 'bubblewrap' or 'namespaces'"),
        ({"colour": 1}, "Extra inputs are not permitted"),
    ],
)
def test_mistakes_are_told_with_the_rule(changes: dict[str, Any], reason: str):
    with pytest.raises(ValidationError, match=reason):
        ToolConfig(**{**OWN, **changes})


def test_two_tools_of_one_name():
    check_names([ToolConfig(**OWN), ToolConfig(**{**OWN, "name": "u"})])
    with pytest.raises(ValueError, match="the name 't' occurs 2 times"):
        check_names([ToolConfig(**OWN)] * 2)
