"""Fake servers on two nodes of a job, both on this machine, with the same engine and the same faults."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dapo_mcore.errors import ConfigError, RolloutError
from dapo_mcore.rollout.sglang.launch.node_servers import Node, NodeHost, NodeServer, start_node_servers
from dapo_mcore.rollout.sglang.launch.servers import ServerPlan
from tests.rollout.sglang.asserts import assert_survives_two_deaths, assert_whole
from tests.rollout.sglang.fake_server import fake_python
from tests.rollout.sglang.serving import (
    STOP,
    engine,
    params,
    processes,
    prompts,
    settings,
    tiny_config,
    weights,
)

TOKEN = "a" * 64


@pytest.fixture
def hosts() -> Iterator[list[NodeHost]]:
    made = [NodeHost("127.0.0.1", TOKEN) for _ in range(2)]
    yield made
    for host in made:
        host.close()


def plan(folder: Path, **changes) -> ServerPlan:
    return ServerPlan.new(settings(fake_python(folder), **changes), tiny_config(), "float32", (STOP,), folder)


def test_three_servers_on_two_nodes_serve_survive_faults_and_end_with_the_engine(tmp_path, hosts):
    nodes = [host.node for host in hosts]
    with engine(tmp_path, placement="nodes", host="node", num_servers=3, nodes=nodes) as made:
        assert [server.node for server in processes(made)] == [nodes[0], nodes[1], nodes[0]]
        assert_survives_two_deaths(made)
        pids = [process.pid for process in processes(made)]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_lost_node_is_a_dead_server_and_the_others_go_on(tmp_path, hosts):
    with engine(
        tmp_path, placement="nodes", host="node", num_servers=2, nodes=[host.node for host in hosts], restart_budget=9
    ) as made:
        made.update_weights(weights(0), version=1)
        hosts[1].close()
        asked = prompts(20)
        assert_whole(made.generate(asked, params(16)), asked, 16, version=1)
        lost = processes(made)[1]
        assert not lost.alive and lost.pid is None and lost.last_line() == ""
        assert lost.last_words() == f"its node {hosts[1].node.url} does not answer"
        with pytest.raises(RolloutError, match=f"node {hosts[1].node.url} cannot restart server 1"):
            lost.restart()


def test_a_mistake_on_a_node_is_the_message_of_rank_0(tmp_path, hosts):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"a server cannot listen on rollout\.sglang\.host .* port {port}"):
            start_node_servers(plan(tmp_path, base_port=port), [hosts[0].node])
    gone = Node("http://127.0.0.1:9", TOKEN)
    with pytest.raises(ConfigError, match=r"node http://127\.0\.0\.1:9 cannot start server 0: .*refused"):
        start_node_servers(plan(tmp_path), [gone])
    broken = replace(plan(tmp_path), model={})
    with pytest.raises(ConfigError, match="cannot start server 0: KeyError: 'model_type'"):
        start_node_servers(broken, [hosts[0].node])


def test_only_the_runs_own_token_and_only_servers_methods_are_answered(tmp_path, hosts):
    (server,) = start_node_servers(plan(tmp_path), [hosts[0].node])
    stranger = NodeServer(Node(hosts[0].node.url, "b" * 64), 0, 0)
    assert server.alive and not stranger.alive
    stranger.stop()
    assert server.alive
    for method in ("close", "_start", "node", "__init__"):
        with pytest.raises(OSError, match="404"):
            server._call(method, 10.0)
    server.stop()
    assert not server.alive
