"""Tools as a rollout uses them: results of every kind, many calls at once, samples' state, cancelled calls, and their end."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from concurrent.futures import wait as wait_all
from pathlib import Path
from typing import Any

import psutil
import pytest

from dapo_mcore.config.tools import ToolConfig
from dapo_mcore.errors import ToolError
from dapo_mcore.tools.result import Kind
from dapo_mcore.tools.toolset import ToolSet
from tests.reward.waiting import wait_for

ZOO = Path(__file__).with_name("tool_zoo.py")
QUERY = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}


def tool(function: str, /, **settings: Any) -> ToolConfig:
    return ToolConfig(**{"name": function, "function": f"{ZOO}:{function}", "parameters": QUERY, **settings})


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ToolSet]:
    before = psutil.Process().children(recursive=True)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    monkeypatch.setenv("COUNTER_FILE", str(tmp_path_factory.mktemp("counter") / "file"))
    with ToolSet(
        [
            tool("echo", description="Repeat."),
            tool("echo_later"),
            tool("values", max_output_characters=1000),
            tool("act", timeout_s=0.5),
            tool("act_async", timeout_s=0.5),
            tool("Counter", workers=2),
            ToolConfig(name="sum", function="calculator"),
        ]
    ) as started:
        yield started
    assert [child for child in psutil.Process().children(recursive=True) if child not in before] == []
    monkeypatch.undo()


def call(tools: ToolSet, name: str, arguments: Any, session: str = "s") -> tuple[Kind, str]:
    result = tools.call(session, name, arguments).result(timeout=60)
    return result.kind, result.text


def test_plain_and_async_functions_and_the_calculator(tools: ToolSet):
    assert call(tools, "echo", {"query": "naïve 🙂"}) == (Kind.OK, "naïve 🙂")
    assert call(tools, "echo", "not JSON") == (Kind.OK, "not JSON")
    assert call(tools, "echo", '{"query": "JSON"}') == (Kind.OK, "JSON")
    assert call(tools, "echo_later", {"query": "x"}) == (Kind.OK, "x")
    assert call(tools, "sum", "2 * 21") == (Kind.OK, "42")
    assert call(tools, "sum", "1 / 0") == (Kind.ERROR, "ZeroDivisionError: division by zero")
    assert call(tools, "values", "none") == (Kind.OK, "null")
    assert call(tools, "values", "list") == (Kind.OK, '[1, "é"]')
    assert call(tools, "values", "secret") == (Kind.OK, "null")


def test_the_policys_mistakes_are_errors_that_it_can_read(tools: ToolSet):
    known = "echo, echo_later, values, act, act_async, Counter, sum"
    assert call(tools, "ecco", {}) == (Kind.ERROR, f"there is no tool 'ecco'; the tools are: {known}")
    assert call(tools, "echo", {}) == (Kind.ERROR, "the arguments do not fit echo: 'query' is a required property")
    kind, text = call(tools, "echo", {"query": 7})
    assert (kind, text) == (Kind.ERROR, "the arguments do not fit echo: query: 7 is not of type 'string'")
    assert call(tools, "act", "raise no such page") == (Kind.ERROR, "ValueError: no such page")
    assert call(tools, "act", "quit") == (Kind.ERROR, "SystemExit: 3")
    assert call(tools, "act_async", "quit") == (Kind.ERROR, "SystemExit: 3")
    assert call(tools, "act", "print to standard output")[0] is Kind.OK


def test_failures_that_are_not_the_policys(tools: ToolSet):
    assert call(tools, "act", "away the index is down") == (Kind.INFRASTRUCTURE, "ToolUnavailable: the index is down")
    assert call(tools, "act", "refused port 9") == (Kind.INFRASTRUCTURE, "ConnectionRefusedError: port 9")
    assert call(tools, "act", "exit") == (Kind.INFRASTRUCTURE, "the tool's process ended during the call")
    assert call(tools, "act", "again") == (Kind.OK, "did again")
    for name, kind in (("bytes", "bytes"), ("set", "set"), ("nan", "float")):
        told = (
            f"the tool gave a value of type {kind}; it must return text (decode bytes), or a value that JSON has "
            "(neither NaN nor infinity)"
        )
        assert call(tools, "values", name) == (Kind.INFRASTRUCTURE, told)


def test_long_output_loses_its_middle(tools: ToolSet):
    kind, text = call(tools, "values", "long")
    assert (kind, text) == (Kind.OK, "a" * 500 + "\n[99000 characters left out]\n" + "z" * 500)


def test_a_timeout_takes_only_its_own_call(tools: ToolSet):
    calls = [tools.call("s", "act", f"sleep {s}") for s in (30, 0, 0)] + [tools.call("s", "act_async", "sleep 30")]
    found = [future.result(timeout=60) for future in calls]
    assert [result.kind for result in found] == [Kind.TIMEOUT, Kind.OK, Kind.OK, Kind.TIMEOUT]
    assert found[0].text == "[timed out after 0.5 s]" and 0.5 <= found[0].seconds < 20


def test_a_process_whose_threads_are_stuck_is_replaced(tools: ToolSet):
    for _ in range(2):
        stuck = [tools.call("s", "act", "sleep 600") for _ in range(8)]
        assert {future.result(timeout=60).kind for future in stuck} == {Kind.TIMEOUT}
    assert call(tools, "act", "work") == (Kind.OK, "did work")


def test_a_process_that_answers_nothing_at_all_is_killed(tools: ToolSet, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dapo_mcore.tools.function_tool.GRACE_S", 0.5)
    assert call(tools, "act_async", "block 600") == (Kind.TIMEOUT, "[timed out after 0.5 s]")
    assert call(tools, "act_async", "work") == (Kind.OK, "did work")


def test_a_samples_state_lives_in_one_process_until_the_sample_ends(tools: ToolSet):
    first = [call(tools, "Counter", text, session=f"sample {n}")[1] for n in range(4) for text in ("a", "b", "c")]
    pids = [line.split()[0] for line in first]
    assert [line.split()[1:] for line in first] == [["a"], ["a", "b"], ["a", "b", "c"]] * 4
    assert all(len(set(pids[n : n + 3])) == 1 for n in range(0, 12, 3)) and len(set(pids)) <= 2
    for n in range(4):
        tools.close_session(f"sample {n}").result(timeout=60)
    assert Path(os.environ["COUNTER_FILE"]).read_text() == "a b c\n" * 4
    assert call(tools, "Counter", "new", session="sample 0")[1].split()[1:] == ["new"]
    tools.close_session("sample 0").result(timeout=60)


def test_a_lost_state_is_a_failure_and_other_samples_go_on(tools: ToolSet):
    assert call(tools, "Counter", "a", session="lost")[0] is Kind.OK
    assert call(tools, "Counter", "die", session="lost")[0] is Kind.INFRASTRUCTURE
    kind, text = call(tools, "Counter", "b", session="lost")
    assert (kind, text) == (
        Kind.INFRASTRUCTURE,
        "the tool's process has ended, and with it what it knew of this sample",
    )
    tools.close_session("lost").result(timeout=60)
    assert call(tools, "Counter", "a", session="other")[0] is Kind.OK


def test_calls_are_cancelled_by_their_future_or_with_their_sample(tools: ToolSet):
    future = tools.call("s", "echo_later", "x")
    future.cancel()
    with pytest.raises(CancelledError):
        future.result(timeout=60)
    pending = [tools.call("gone", "act", "sleep 0.4") for _ in range(3)]
    time.sleep(0.05)
    tools.close_session("gone").result(timeout=60)
    assert all(future.cancelled() or future.exception() for future in pending)
    wait_for(lambda: tools.num_calls() == 0)
    assert call(tools, "act", "work") == (Kind.OK, "did work")


def test_a_thousand_calls_at_once(tools: ToolSet):
    futures = [tools.call(f"s{n}", "echo_later", f"{n}") for n in range(1000)]
    wait_all(futures, timeout=120)
    assert [future.result().text for future in futures] == [str(n) for n in range(1000)]


def test_schemas_are_openais(tools: ToolSet):
    by_name = {schema["function"]["name"]: schema for schema in tools.schemas}
    assert by_name["echo"] == {
        "type": "function",
        "function": {"name": "echo", "description": "Repeat.", "parameters": QUERY},
    }
    assert by_name["act"]["function"]["description"] == "Do what the query says, to this process too."
    assert by_name["sum"]["function"]["parameters"]["required"] == ["expression"]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"function": f"{ZOO}:absent"}, "tools: t.function .* has no function 'absent'"),
        ({"function": "absent.py:f"}, "absent.py cannot be imported: FileNotFoundError"),
        ({"function": f"{ZOO}:two"}, r"does not take the arguments .* \(query\): missing a required argument: 'more'"),
        ({"function": f"{ZOO}:NotCallable"}, "is a class without __call__"),
        (
            {"parameters": {"type": "object", "required": "query"}},
            "t.parameters is no JSON schema: .*'query' is not of type",
        ),
        ({"parameters": {"type": "object", "properties": {"q": {}}}}, r"declare \(q\): missing a required argument"),
    ],
)
def test_a_tool_that_cannot_work_is_refused_at_the_start(settings: dict[str, Any], reason: str):
    before = set(psutil.Process().children())
    with pytest.raises(ToolError, match=reason):
        ToolSet([tool("echo"), tool("echo", **{"name": "t", "workers": 2, **settings})])
    assert set(psutil.Process().children()) == before, "tools that had started are left"
