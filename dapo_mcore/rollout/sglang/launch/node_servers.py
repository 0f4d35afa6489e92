"""SGLang servers on the nodes of the training job. The first rank of each node is the parent of that node's servers.

    rank 0:  NodeServer ── HTTP with the run's token, JSON ──→ NodeHost, in the first rank of each node ── ServerProcess

Change here: how servers are spread over nodes, and what can be asked of a node. The processes are those of process.py, and the
pool treats both alike. A node's servers die with its first rank.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError

from dapo_mcore.config.sglang import SGLangConfig
from dapo_mcore.errors import ConfigError, RolloutError
from dapo_mcore.rollout.sglang.client.api import Keys
from dapo_mcore.rollout.sglang.launch.interpreter import Installed, inspect_environment
from dapo_mcore.rollout.sglang.launch.methods import CONFIG_ERROR, MethodClient, MethodServer
from dapo_mcore.rollout.sglang.launch.process import STOP_S, ServerProcess
from dapo_mcore.rollout.sglang.launch.servers import ServerPlan, check_devices, reserve_port

_ANSWER_TIMEOUT_S = 30.0
_START_TIMEOUT_S = 300.0
"""Seconds for a start. The first one on a node asks the interpreter for its SGLang, perhaps on a network file system."""
_METHODS = ("start", "restart", "alive", "pid", "ask_to_stop", "stop", "last_words", "last_line")


class Node(NamedTuple):
    """A node of the job: the URL of its NodeHost, the token that it wants, and the rank of the trainer that it is in."""

    url: str
    token: str
    rank: int = 0


class NodeHost:
    """Starts, watches and ends the servers of this node, as rank 0 asks by the methods of _METHODS.

    address  of this machine, as rank 0 reaches it.
    token    a secret of the run; requests without it are refused.
    rank     of this process.
    """

    def __init__(self, address: str, token: str, rank: int = 0):
        self._address = address
        self._servers: dict[int, ServerProcess] = {}
        self._installed: Installed | None = None
        # the death of the thread that made a child is told to the child as its parent's, so this one makes all and stays
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="servers")
        self._http = MethodServer(address, token, self, _METHODS)
        self.node = Node(self._http.url, token, rank)

    def start(self, number: int, plan: dict[str, Any], first_gpu: int) -> str:
        """Start server `number` and return its URL."""
        return self._starter.submit(self._start, number, _plan(plan), first_gpu).result()

    def _start(self, number: int, plan: ServerPlan, first_gpu: int) -> str:
        self._installed = self._installed or inspect_environment(plan.settings, plan.continues_requests)
        check_devices(plan.settings, num_servers=1, first_gpu=first_gpu)
        plan.folder.mkdir(parents=True, exist_ok=True)
        port = reserve_port(plan.settings, self._address, number)
        self._servers[number] = plan.build(number, self._address, port, first_gpu, self._installed)
        self._servers[number].start()
        return self._servers[number].url

    def restart(self, number: int) -> None:
        self._starter.submit(self._servers[number].restart).result()

    def alive(self, number: int) -> bool:
        return self._servers[number].alive

    def pid(self, number: int) -> int | None:
        return self._servers[number].pid

    def ask_to_stop(self, number: int) -> None:
        self._servers[number].ask_to_stop()

    def stop(self, number: int, timeout_s: float) -> None:
        self._servers[number].stop(timeout_s)

    def last_words(self, number: int) -> str:
        return self._servers[number].last_words()

    def last_line(self, number: int) -> str:
        return self._servers[number].last_line()

    def close(self) -> None:
        """Answer no more, and end the servers that are left."""
        self._http.close()
        for server in self._servers.values():
            server.stop()
        self._starter.shutdown()


class NodeServer:
    """One server through its `node`, with the methods of ServerProcess. A node that does not answer counts as a dead server."""

    def __init__(self, node: Node, number: int, first_gpu: int):
        self.node, self._number, self._first_gpu = node, number, first_gpu
        self._methods = MethodClient(node.url, node.token)
        self.url = ""

    def start(self, plan: ServerPlan) -> None:
        """Start the server. Raise ConfigError if its node cannot, or does not answer."""
        where = f"node {self.node.url} cannot start server {self._number}"
        try:
            self.url = self._call("start", _START_TIMEOUT_S, plan=_content(plan), first_gpu=self._first_gpu)
        except HTTPError as error:
            said = json.loads(error.read())
            raise ConfigError(said if error.code == CONFIG_ERROR else f"{where}: {said}") from error
        except OSError as error:
            raise ConfigError(f"{where}: {error}") from error

    @property
    def alive(self) -> bool:
        return self._ask("alive", otherwise=False)

    @property
    def pid(self) -> int | None:
        return self._ask("pid", otherwise=None)

    def restart(self) -> None:
        """Restart the server at its place. Raise RolloutError if its node does not."""
        try:
            self._call("restart", _START_TIMEOUT_S)
        except OSError as error:
            raise RolloutError(f"node {self.node.url} cannot restart server {self._number}: {error}") from error

    def ask_to_stop(self) -> None:
        self._ask("ask_to_stop", otherwise=None)

    def stop(self, timeout_s: float = STOP_S) -> None:
        self._ask("stop", otherwise=None, timeout_s=timeout_s)

    def last_words(self) -> str:
        return self._ask("last_words", otherwise=f"its node {self.node.url} does not answer")

    def last_line(self) -> str:
        return self._ask("last_line", otherwise="")

    def _ask(self, method: str, otherwise: Any, **arguments: Any) -> Any:
        try:
            return self._call(method, _ANSWER_TIMEOUT_S, **arguments)
        except OSError:
            return otherwise

    def _call(self, method: str, answer_timeout_s: float, **arguments: Any) -> Any:
        return self._methods.call(method, answer_timeout_s, number=self._number, **arguments)


def start_node_servers(plan: ServerPlan, nodes: Sequence[Node]) -> list[NodeServer]:
    """Start the plan's servers, in turn over the nodes, on each from first_gpu on. Raise ConfigError as start_servers does."""
    settings = plan.settings
    places = [(nodes[i % len(nodes)], i // len(nodes)) for i in range(settings.num_servers)]
    servers = [
        NodeServer(node, number, (settings.first_gpu or 0) + index * settings.tensor_parallel)
        for number, (node, index) in enumerate(places)
    ]
    plan.write_keys()
    with ThreadPoolExecutor(len(nodes)) as pool:  # a node starts one at a time
        list(pool.map(lambda server: server.start(plan), servers))
    return servers


def _content(plan: ServerPlan) -> dict[str, Any]:
    return {
        **asdict(plan),
        "settings": plan.settings.model_dump(mode="json"),
        "keys": asdict(plan.keys),
        "folder": str(plan.folder),
    }


def _plan(content: dict[str, Any]) -> ServerPlan:
    settings, keys = SGLangConfig(**content["settings"]), Keys(**content["keys"])
    return ServerPlan(**{**content, "settings": settings, "keys": keys, "folder": Path(content["folder"])})
