"""The built-in tool `python`: model-written code in a sandbox, each call in an interpreter of its own.

Change here: what the policy reads beside the code's output.
"""

from __future__ import annotations

import math
import os
import signal
from typing import Any

from dapo_mcore.config.tools import ToolConfig
from dapo_mcore.tools.result import Kind, ToolResult, clip
from dapo_mcore.tools.sandbox.inside.cell import Limits
from dapo_mcore.tools.sandbox.inside.template import OUTPUT_FLOOD
from dapo_mcore.tools.sandbox.pool import SandboxPool
from dapo_mcore.tools.sandbox.worker import Ending, Settings, WorkerLost

DESCRIPTION = (
    "Run Python code and return what it prints, and the value of its last line. Each call starts anew: variables and files of "
    "earlier calls are gone. There is no network."
)
PARAMETERS = {
    "type": "object",
    "properties": {"code": {"type": "string", "description": "the code"}},
    "required": ["code"],
    "additionalProperties": False,
}
_BYTES_PER_CHARACTER = 4


class PythonTool:
    """The sandbox as a tool. It keeps no state: no call sees anything of another, of the same sample or not."""

    def __init__(self, config: ToolConfig):
        self._config = config
        limits = config.sandbox
        self._cpu_s = math.ceil(config.timeout_s)
        self._pool = SandboxPool(
            limits.mechanism,
            config.workers or os.cpu_count() or 1,
            Settings(
                Limits(self._cpu_s, limits.memory_mib, limits.disk_mib, limits.threads),
                tuple(limits.preload),
            ),
        )

    keeps_state = False
    documentation = DESCRIPTION

    async def start(self) -> None:
        """Start the first interpreter. Raise ToolError if no sandbox holds here."""
        await self._pool.start()

    async def run(self, session: str, arguments: dict[str, Any]) -> ToolResult:
        """Run the code once and return what it printed."""
        most = self._config.max_output_characters
        try:
            ending = await self._pool.run(arguments["code"], self._config.timeout_s, _BYTES_PER_CHARACTER * most)
        except WorkerLost as error:
            return ToolResult(Kind.INFRASTRUCTURE, f"the sandbox has failed twice: {error}")
        if ending.ended == "no cell":
            return ToolResult(Kind.INFRASTRUCTURE, f"the sandbox could not wall in a call: {ending.head}")
        kind, note = self._verdict(ending)
        text = clip(ending.head + ending.tail, most, ending.left_out)
        if note:
            text = f"{text}\n{note}" if text and not text.endswith("\n") else text + note
        return ToolResult(kind, text, ending.seconds, cpu_seconds=ending.cpu_seconds)

    async def end_session(self, session: str) -> None:
        """Do nothing."""

    async def close(self) -> None:
        """Kill all interpreters."""
        await self._pool.close()

    def _verdict(self, ending: Ending) -> tuple[Kind, str]:
        """Return the kind, and a note for the policy where its code did not end by itself."""
        if ending.ended == "exit":
            return (Kind.ERROR if ending.status else Kind.OK), ""
        if ending.ended == "timeout":
            return Kind.TIMEOUT, f"[timed out after {self._config.timeout_s:g} s]"
        if ending.ended == "flood":
            return Kind.ERROR, f"[ended: more than {OUTPUT_FLOOD >> 20} MiB of output]"
        if ending.status == signal.SIGKILL and ending.cpu_seconds >= self._cpu_s:
            return Kind.TIMEOUT, f"[ended: more than {self._cpu_s} s of CPU time]"
        return Kind.ERROR, f"[ended by signal {ending.status}: {signal.strsignal(ending.status)}]"
