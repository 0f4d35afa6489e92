"""Calls of tools in the text of a turn. Text goes in, a call comes out; nothing is run here.

Change here: another way in which a policy writes calls.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Protocol

from dapo_mcore.errors import shortened

_EXAMPLE = '{"name": …, "arguments": {…}}'
_LONGEST = 200


@dataclass(frozen=True, slots=True)
class Call:
    """A call as the policy wrote it.

    is_code  True if the arguments are the text of a tool's only argument. Else they are a JSON object, or such a text if they are
             none: {"name": "calculator", "arguments": "1 + 1"}.
    problem  why it cannot be made, for the policy to read; empty if it can.
    closed   False if the text ends before the call does.
    """

    name: str
    arguments: str
    problem: str = ""
    closed: bool = True
    is_code: bool = False


class CallFormat(Protocol):
    """One way to write a call. `end` is the text that closes a call."""

    end: str

    def find(self, text: str) -> Call | None:
        """Return the first call that is closed, or one that is not closed, or None."""
        ...


class ToolCallTags:
    """JSON between <tool_call> and </tool_call>: {"name": "python", "arguments": {"code": "1 + 1"}}."""

    begin, end = "<tool_call>", "</tool_call>"

    def find(self, text: str) -> Call | None:
        _, begin, rest = text.partition(self.begin)
        if not begin:
            return None
        inside, end, _ = rest.partition(self.end)
        if not end:
            return Call("", inside, f"the call has no {self.end}, so it was not made; close it", closed=False)
        return _read_json(inside)


class CodeBlocks:
    """A block of Python between lines of three backticks. Its code is the argument of the tool `name`.

    Blocks of other languages are text. A line that begins with three backticks closes the block that is open.
    """

    end = "```"
    _FENCE = re.compile(r"^[ \t]*```([^\n`]*)", re.MULTILINE)

    def __init__(self, name: str):
        self._name = name

    def find(self, text: str) -> Call | None:
        opened: re.Match[str] | None = None
        for fence in self._FENCE.finditer(text):
            if opened is None:
                opened = fence
                continue
            if _is_python(opened):
                return Call(self._name, text[opened.end() + 1 : fence.start()], is_code=True)
            opened = None
        if opened is None or not _is_python(opened):
            return None
        code = text[opened.end() + 1 :]
        return Call(
            self._name, code, f"the code block has no closing {self.end}, so it was not run; close it", closed=False
        )


def _is_python(fence: re.Match[str]) -> bool:
    return fence[1].strip().lower() in ("python", "py")


def _read_json(text: str) -> Call:
    try:
        found = json.loads(text, strict=False)  # policies write line breaks inside strings
    except (ValueError, RecursionError) as error:
        return Call("", text, f"the call is no JSON: {shortened(str(error), _LONGEST)}; write {_EXAMPLE}")
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return Call("", text, f"the call is not a JSON object with a name; write {_EXAMPLE}")
    name, arguments = _valid(found["name"]), found.get("arguments", {})
    if not isinstance(arguments, (dict, str)):
        return Call(name, text, f"the arguments are not a JSON object; write {_EXAMPLE}")
    return Call(name, _valid(arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)))


def _valid(text: str) -> str:
    """Return the text without halves of surrogate pairs, which JSON may hold but UTF-8 may not."""
    return text.encode(errors="replace").decode()
