"""What the policy reads of its code: output, errors, and notes where the code did not end by itself."""

from __future__ import annotations

import pytest

from dapo_mcore.config.tools import ToolConfig
from dapo_mcore.tools.python_tool import PythonTool
from dapo_mcore.tools.result import Kind
from dapo_mcore.tools.sandbox.worker import Ending, WorkerLost
from dapo_mcore.tools.toolset import ToolSet
from tests.tools.sandbox.boxes import skip_without_sandbox

CONFIG = ToolConfig(
    name="python", function="python", timeout_s=2.0, max_output_characters=20, workers=1,
    sandbox={"preload": ["numpy"], "memory_mib": 1024},
)  # fmt: skip


def test_calls_in_a_real_sandbox():
    skip_without_sandbox()
    with ToolSet([CONFIG]) as tools:
        texts = ["import numpy\nnumpy.arange(3).sum()", "1 /", "while True: pass", "print('a' * 15, 'b' * 15)"]
        results = [tools.call(f"s{n}", "python", text).result(timeout=60) for n, text in enumerate(texts)]
        tools.close_session("s0").result(timeout=60)
        (schema,) = tools.schemas
    assert [result.kind for result in results] == [Kind.OK, Kind.ERROR, Kind.TIMEOUT, Kind.OK]
    assert results[0].text == "3\n" and results[0].cpu_seconds > 0
    assert results[2].text == "[timed out after 2 s]"
    assert results[3].text == "aaaaaaaaaa\n[12 characters left out]\nbbbbbbbbb\n"
    assert (
        schema["function"]["parameters"]["required"] == ["code"] and "no network" in schema["function"]["description"]
    )


@pytest.mark.parametrize(
    ("ending", "kind", "text"),
    [
        (("exit", 0, "a\n"), Kind.OK, "a\n"),
        (("exit", 0, ""), Kind.OK, ""),
        (("exit", 3, "a\n"), Kind.ERROR, "a\n"),
        (("timeout", 9, "a"), Kind.TIMEOUT, "a\n[timed out after 2 s]"),
        (("timeout", 9, "a\n"), Kind.TIMEOUT, "a\n[timed out after 2 s]"),
        (("flood", 9, "a\n"), Kind.ERROR, "a\n[ended: more than 16 MiB of output]"),
        (("signal", 11, ""), Kind.ERROR, "[ended by signal 11: Segmentation fault]"),
        (("signal", 9, "", 2.1), Kind.TIMEOUT, "[ended: more than 2 s of CPU time]"),
        (("no cell", 0, "why"), Kind.INFRASTRUCTURE, "the sandbox could not wall in a call: why"),
    ],
)
def test_each_ending_has_a_kind_and_a_note(monkeypatch: pytest.MonkeyPatch, ending, kind: Kind, text: str):
    ended, status, head, *cpu = ending

    async def run(*_: object) -> Ending:
        return Ending(ended, status, head, "", 0, 0.1, *(cpu or [0.1]))

    assert outcome(monkeypatch, run) == (kind, text)


def test_a_sandbox_that_is_lost_is_no_error_of_the_policy(monkeypatch: pytest.MonkeyPatch):
    async def run(*_: object) -> Ending:
        raise WorkerLost("gone")

    assert outcome(monkeypatch, run) == (Kind.INFRASTRUCTURE, "the sandbox has failed twice: gone")


def outcome(monkeypatch: pytest.MonkeyPatch, run) -> tuple[Kind, str]:
    import asyncio

    monkeypatch.setattr("dapo_mcore.tools.sandbox.pool.SandboxPool.run", run)

    async def call():
        return await PythonTool(CONFIG).run("s", {"code": "1"})

    result = asyncio.run(call())
    return result.kind, result.text
