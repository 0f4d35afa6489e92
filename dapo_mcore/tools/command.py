"""`dapo-mcore tool`: one call of a tool as a rollout would make it, and what the policy would see.

Change here: what the command prints.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import Field, model_validator

from dapo_mcore.config.file import load_sections
from dapo_mcore.config.sections import RayConfig
from dapo_mcore.config.tools import BUILT_IN, ToolConfig, check_names
from dapo_mcore.config.values import Section
from dapo_mcore.errors import ConfigError, ToolError
from dapo_mcore.tools.result import Kind
from dapo_mcore.tools.toolset import ToolSet

_SESSION = "dapo-mcore tool"


class _Sections(Section):
    """What a call needs of a configuration. A file may have these alone, without the model and data of a run."""

    tools: list[ToolConfig] = Field(default_factory=list)
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _check_names(self) -> _Sections:
        check_names(self.tools)
        return self


def run(name: str, call: str, file: Path | None, overrides: list[str]) -> int:
    """Make the call. Print what the policy would see, and how the call ended on standard error.

    Return 0, also after an error of the policy's; 1 for a failure that would take the sample out of training.
    """
    with ToolSet(*_find(name, file, overrides)) as tools:
        result = tools.call(_SESSION, name, call).result()
        tools.close_session(_SESSION).result()
    print(result.text, end="" if result.text.endswith("\n") else "\n", flush=True)
    cpu = f", {1000 * result.cpu_seconds:.0f} ms of CPU" if result.cpu_seconds else ""
    print(f"# {result.kind}, {1000 * result.seconds:.0f} ms{cpu}", file=sys.stderr)
    return int(result.kind is Kind.INFRASTRUCTURE)


def _find(name: str, file: Path | None, overrides: list[str]) -> tuple[list[ToolConfig], str | None]:
    """Return the tool, and the address of the Ray cluster for a tool that is placed there."""
    if file is None:
        if overrides:
            raise ConfigError(f"{overrides[0]} changes a configuration, but none is given: add --config FILE")
        if name not in BUILT_IN:
            raise ToolError(
                f"there is no tool {name!r}; built in are {' and '.join(BUILT_IN)}, and --config FILE adds those of a configuration"
            )
        return [ToolConfig(name=name, function=name)], None
    config = load_sections(file, overrides, _Sections)
    tools = {tool.name: tool for tool in config.tools}
    if name not in tools:
        raise ToolError(f"{file} has no tool {name!r}; its tools are: {', '.join(tools) or 'none'}")
    return [tools[name]], config.ray.address
