"""The result of one call of a tool, and what gives it.

Change here: what a rollout learns of a call.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol


class Kind(StrEnum):
    """How a call ended. Only INFRASTRUCTURE is not the policy's doing: such a sample must not enter any statistics."""

    OK = "ok"
    ERROR = "error"
    """The policy's error: an unknown tool, arguments that do not fit, code that fails."""
    TIMEOUT = "timeout"
    INFRASTRUCTURE = "infrastructure"
    """A process was lost, a server behind the tool is away, or the tool itself is broken."""


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What the policy sees of a call (`text`), and what the trainer notes.

    seconds         while the call ran; waited_seconds before that, for a free worker.
    cpu_seconds     of the sandbox; 0 for other tools.
    """

    kind: Kind
    text: str
    seconds: float = 0.0
    waited_seconds: float = 0.0
    cpu_seconds: float = 0.0


class Runner(Protocol):
    """What runs the calls of one tool. All methods run on one event loop and must not block it.

    keeps_state    True if a sample's calls share something; `documentation` is for the policy. Both are known after `start`.
    """

    @property
    def keeps_state(self) -> bool: ...
    @property
    def documentation(self) -> str: ...
    async def start(self) -> None: ...
    async def run(self, session: str, arguments: dict[str, Any]) -> ToolResult: ...
    async def end_session(self, session: str) -> None: ...
    async def close(self) -> None: ...


class ToolUnavailable(Exception):
    """For a tool to raise: what it needs is away, through no fault of the policy. The sample is not trained on."""


def clip(text: str, most: int, missing: int = 0) -> str:
    """Return the text, at most `most` characters of it and a note in the middle.

    missing  characters that are left out between the two halves already.
    """
    if len(text) <= most and not missing:
        return text
    head, tail = text[: most - most // 2], text[len(text) - most // 2 :]
    return f"{head}\n[{len(text) - most + missing} characters left out]\n{tail}"
