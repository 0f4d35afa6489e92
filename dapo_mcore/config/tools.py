"""The tools that a policy may call while it writes a response.

Change here: a setting of a tool. dapo_mcore/tools/README.md explains them with examples.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from dapo_mcore.config.values import Count, FilePath, Seconds, Section, Text

BUILT_IN = ("python", "calculator")


def _checked_tool_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]{0,63}", name):
        raise ValueError(
            "a tool's name has 1 to 64 letters, digits, dashes and underscores and does not begin with a digit or dash: chat "
            f"templates allow no others; this one has {len(name)} characters"
        )
    return name


class SandboxConfig(Section):
    """Walls and limits of function `python`. They hold for each call, so that `workers` calls may take as much each."""

    mechanism: Literal["auto", "bubblewrap", "namespaces"] = "auto"
    """`bubblewrap` needs the Debian package of that name; `namespaces` needs Linux 5.13 with Landlock. `auto` takes the first
    that works. Where none does, or an attack succeeds at the start, no model-written code runs."""
    memory_mib: int = Field(2048, ge=64, le=1_000_000)
    """Address space, of which Python with numpy and sympy takes about 300."""
    disk_mib: int = Field(64, ge=1, le=1_000_000)
    """Files in /tmp. They lie in memory, beside memory_mib."""
    threads: int = Field(32, ge=1, le=10_000)
    """Threads of one call. It cannot start processes."""
    preload: list[str] = Field(default_factory=lambda: ["numpy", "sympy"])
    """Modules that are loaded once and not in every call: sympy alone takes 0.3 s. Each idle worker keeps them in memory."""


class ToolConfig(Section):
    """One tool."""

    name: Annotated[str, AfterValidator(_checked_tool_name)]
    """What the policy calls it."""
    function: FilePath
    """`python`, `calculator`, or an import path `package.module:function` / `path/to/file.py:function`.

    A function, async or plain, is called with the arguments by name and returns text, or any value that JSON has. A class is
    the state of a sample: it is created without arguments at the sample's first call, called like a function, and its
    `close`, if it has one, is called at the sample's end."""
    description: Text = ""
    """For the policy. Empty: that of the built-in tool, or the function's docstring."""
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments, an object. Built-in tools have their own; for functions it is needed."""
    timeout_s: Seconds = 30.0
    """Of one call, from when it starts to run: waiting for a free worker does not count."""
    max_output_characters: Count = 8192
    """Longer results lose their middle."""
    workers: int | None = Field(None, ge=1, le=10_000)
    """Processes of this tool on this machine. `python` runs one call in each, and has by default as many as the machine has
    cores; a function's process runs many calls at once, and there is one by default."""
    placement: Literal["local", "ray"] = "local"
    """Where the processes run: on the machine of the first rank, or spread over the nodes of the Ray cluster (section `ray`).
    There each of `workers` takes one CPU, and a file that `function` names must be on all nodes."""
    sandbox: SandboxConfig = SandboxConfig()

    @model_validator(mode="after")
    def _check_fields(self) -> ToolConfig:
        if self.function != "python" and self.sandbox != SandboxConfig():
            raise ValueError(
                f"sandbox is for function python; {self.function!r} is your own code and runs without one: leave sandbox out"
            )
        if self.placement == "ray" and self.workers is None:
            raise ValueError("placement ray needs workers, the number of processes to spread over the nodes: 1 or more")
        if self.function not in BUILT_IN:
            if ":" not in self.function:
                raise ValueError(
                    f"function {self.function!r} is neither {' nor '.join(BUILT_IN)} nor an import path; write "
                    "package.module:function or path/to/file.py:function"
                )
            if self.parameters is None:
                raise ValueError(
                    "parameters is needed for a function of your own: a JSON schema such as "
                    '{"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}'
                )
        if self.parameters is not None and self.parameters.get("type") != "object":
            raise ValueError(f"parameters is the JSON schema of an object, not of type {self.parameters.get('type')!r}")
        return self


def check_names(tools: Sequence[ToolConfig]) -> None:
    """Raise ValueError if two tools have the same name."""
    names = [tool.name for tool in tools]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"tools: the name {twice!r} occurs {names.count(twice)} times; each tool needs its own")
