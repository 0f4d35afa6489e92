"""What happens inside a tool's process. test_toolset.py has whole calls."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from dapo_mcore.errors import ToolError
from dapo_mcore.tools.function_worker import Tool
from dapo_mcore.tools.result import Kind

ZOO = Path(__file__).with_name("tool_zoo.py")


def tool(function: str, timeout_s: float = 5.0) -> Tool:
    return Tool("t", f"{ZOO}:{function}", ["query"], timeout_s)


def test_threads_that_are_stuck_are_counted_until_they_end():
    slow = tool("act", timeout_s=0.1)

    async def count() -> list[int]:
        calls = [slow.call("s", {"query": "sleep 0.5"}) for _ in range(3)]
        assert {kind for kind, _ in await asyncio.gather(*calls)} == {Kind.TIMEOUT}
        counts = [slow.num_stuck]
        await asyncio.sleep(0.7)
        return [*counts, slow.num_stuck]

    assert asyncio.run(count()) == [3, 0]


def test_calls_of_one_sample_wait_for_each_other_and_share_its_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("COUNTER_FILE", str(tmp_path / "file"))
    counter = tool("Counter")

    async def calls() -> list[int]:
        texts = await asyncio.gather(*(counter.call(session, {"query": "x"}) for session in "aab"))
        await counter.end("a")
        await counter.end("a")
        await counter.end("never seen")
        return sorted(len(text.split()) - 1 for _, text in texts)

    assert asyncio.run(calls()) == [1, 1, 2]
    assert (tmp_path / "file").read_text() == "x x\n"


def test_a_close_that_fails_is_printed(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("COUNTER_FILE", raising=False)
    counter = tool("Counter")

    async def calls() -> None:
        await counter.call("a", {"query": "x"})
        await counter.end("a")

    asyncio.run(calls())
    assert "a tool's close failed: KeyError: 'COUNTER_FILE'" in capfd.readouterr().err


def test_a_function_of_other_arguments_is_refused():
    with pytest.raises(ToolError, match="missing a required argument: 'more'"):
        tool("two")
    assert tool("echo").documentation == "Return the query."
