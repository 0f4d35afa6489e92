"""Tools on a local Ray cluster: the same results as on one machine, and a lost node loses no more than it must."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from dapo_mcore.config.tools import ToolConfig
from dapo_mcore.errors import ConfigError, ToolError
from dapo_mcore.tools.result import Kind
from dapo_mcore.tools.toolset import ToolSet
from tests.tools.sandbox.boxes import skip_without_sandbox

ZOO = Path(__file__).with_name("tool_zoo.py")
QUERY = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}

# not imported here: Ray reads RAY_AUTH_MODE once, while it is imported, and RayTool sets it
pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="pip install 'dapo_mcore[ray]'")


def on_ray(name: str, **settings: object) -> ToolConfig:
    own = {} if name in ("python", "calculator") else {"function": f"{ZOO}:{name}", "parameters": QUERY}
    return ToolConfig(**{"name": name, "function": name, "placement": "ray", "workers": 1, **own, **settings})


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ToolSet]:
    skip_without_sandbox()
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("COUNTER_FILE", str(tmp_path_factory.mktemp("counter") / "file"))  # the cluster inherits it
    configs = [on_ray("python", workers=2, sandbox={"preload": []}), on_ray("act"), on_ray("Counter")]
    with ToolSet(configs) as started:
        yield started
    monkeypatch.undo()


def call(tools: ToolSet, name: str, text: str, session: str = "s") -> tuple[Kind, str]:
    result = tools.call(session, name, text).result(timeout=60)
    return result.kind, result.text


def kill_first_host(tools: ToolSet, name: str) -> None:
    """Kill the actor that would get the tool's next call, as if its node were lost."""
    import ray

    ray.kill(tools._tools[name][1]._hosts[0].actor)


def test_calls_run_in_actors_and_end_as_on_one_machine(tools: ToolSet):
    assert call(tools, "python", "6 * 7") == (Kind.OK, "42\n")
    kind, text = call(tools, "python", "import socket; socket.socket()")
    assert kind is Kind.ERROR and text.endswith("PermissionError: [Errno 1] Operation not permitted\n")
    squares = [tools.call(f"s{n}", "python", f"{n} ** 2") for n in range(20)]
    assert [future.result(timeout=60).text for future in squares] == [f"{n**2}\n" for n in range(20)]
    assert call(tools, "act", "raise no such page") == (Kind.ERROR, "ValueError: no such page")
    assert call(tools, "act", "exit") == (Kind.INFRASTRUCTURE, "the tool's process ended during the call")
    by_name = {schema["function"]["name"]: schema["function"]["description"] for schema in tools.schemas}
    assert by_name["act"] == "Do what the query says, to this process too."


def test_a_sample_keeps_its_state_and_closes_it(tools: ToolSet):
    first = call(tools, "Counter", "a", session="one")[1].split()
    assert call(tools, "Counter", "b", session="one")[1].split() == [*first, "b"]
    assert psutil.Process(int(first[0])).parent().ppid() != os.getpid(), "it does not run beside this process"
    tools.close_session("one").result(timeout=60)
    assert Path(os.environ["COUNTER_FILE"]).read_text() == "a b\n"


def test_the_end_of_a_sample_cancels_its_calls_on_their_node(tools: ToolSet):
    endless = [tools.call("gone", "python", "import time; time.sleep(600)") for _ in range(4)]
    time.sleep(0.3)
    tools.close_session("gone").result(timeout=60)
    assert all(future.cancelled() or future.exception() for future in endless)
    assert [call(tools, "python", "1") for _ in range(3)] == [(Kind.OK, "1\n")] * 3


def test_a_lost_node_is_replaced_and_takes_only_what_it_knew(tools: ToolSet):
    call(tools, "Counter", "a", session="lost")
    for name in ("python", "Counter", "act"):
        kill_first_host(tools, name)
    assert call(tools, "python", "2") == (Kind.OK, "2\n"), "such a call can run again"
    kind, text = call(tools, "act", "work")
    assert kind is Kind.INFRASTRUCTURE and text.startswith("the tool's node is lost: ")
    assert call(tools, "act", "work") == (Kind.OK, "did work")
    assert call(tools, "Counter", "b", session="lost")[0] is Kind.INFRASTRUCTURE
    tools.close_session("lost").result(timeout=60)
    assert call(tools, "Counter", "b", session="lost")[1].split()[1:] == ["b"]
    tools.close_session("lost").result(timeout=60)


def test_a_tool_that_no_node_can_use_is_refused_at_the_start(tools: ToolSet):
    with pytest.raises(ToolError, match="has no function 'absent'") as error:
        ToolSet([on_ray("t", function=f"{ZOO}:absent")])
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="5000 workers need as many CPUs, but the Ray cluster has 1024"):
        ToolSet([on_ray("act", workers=5000)])
    assert call(tools, "act", "work") == (Kind.OK, "did work"), "a tool that did not start the cluster must not end it"
