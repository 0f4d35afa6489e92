"""SGLang servers on the nodes of a Ray cluster. One actor per server starts it on the actor's node and watches it.

Change here: how servers are placed on nodes. The processes are those of process.py, and the pool treats both alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dapo_mcore.errors import ConfigError
from dapo_mcore.process.ray_cluster import connect
from dapo_mcore.rollout.sglang.launch.interpreter import inspect_environment
from dapo_mcore.rollout.sglang.launch.process import STOP_S, ServerProcess
from dapo_mcore.rollout.sglang.launch.servers import ServerPlan, check_devices, reserve_port

_ANSWER_TIMEOUT_S = 30.0
_STOP_ANSWER_S = 10.0
"""Seconds that the answer to `stop` may take beyond the stopping itself."""


class RayServer:
    """One server through its actor, with the methods of ServerProcess.

    A lost actor counts as a dead server. `restart` makes a new actor, perhaps on another node, so the URL may change.
    """

    def __init__(self, plan: ServerPlan, number: int, timeout_s: float):
        self._plan, self._number, self._timeout_s = plan, number, timeout_s
        self._actor: Any = None
        self.url = ""

    @property
    def alive(self) -> bool:
        return self._ask("alive", otherwise=False)

    @property
    def pid(self) -> int | None:
        return self._ask("pid", otherwise=None)

    def create(self) -> None:
        """Ask the cluster for a place and return at once; `wait_until_started` waits for it."""
        import ray

        settings = self._plan.settings
        gpus = settings.tensor_parallel if settings.device == "cuda" else 0
        actor = ray.remote(_Host).options(num_cpus=1, num_gpus=gpus, scheduling_strategy="SPREAD", max_restarts=0)
        self._actor = actor.remote(self._plan, self._number)

    def wait_until_started(self) -> None:
        """Wait until the actor has started the server. Raise ConfigError if the cluster has no room or the node cannot run it."""
        import ray

        try:
            self.url = ray.get(self._actor.start.remote(), timeout=self._timeout_s)
        except ray.exceptions.GetTimeoutError as error:
            raise ConfigError(
                f"the Ray cluster found no place for server {self._number} within {self._timeout_s:g} s; it has "
                f"{ray.cluster_resources()}, and {self._plan.settings.num_servers} servers need 1 CPU and "
                f"{self._plan.settings.tensor_parallel} GPU each (GPU: with device cuda)"
            ) from error
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, ConfigError) else ConfigError(str(error))) from error
        except ray.exceptions.RayError as error:
            raise ConfigError(f"server {self._number}'s Ray actor was lost while it started: {error}") from error

    def restart(self) -> None:
        self.stop()
        self.create()
        self.wait_until_started()

    def ask_to_stop(self) -> None:
        import ray

        if self._actor is not None and ray.is_initialized():
            self._actor.stop.remote()

    def stop(self, timeout_s: float = STOP_S) -> None:
        import ray

        self._ask("stop", otherwise=None, timeout_s=timeout_s + _STOP_ANSWER_S)
        if self._actor is not None and ray.is_initialized():
            ray.kill(self._actor)
        self._actor = None

    def last_words(self) -> str:
        return self._ask("last_words", otherwise="its Ray actor or node is gone")

    def last_line(self) -> str:
        return self._ask("last_line", otherwise="")

    def _ask(self, method: str, otherwise: Any, timeout_s: float = _ANSWER_TIMEOUT_S) -> Any:
        import ray

        if self._actor is None or not ray.is_initialized():
            return otherwise
        try:
            return ray.get(getattr(self._actor, method).remote(), timeout=timeout_s)
        except (ray.exceptions.RayError, TimeoutError):
            return otherwise


class _Host:
    """The actor. It runs on the server's node and is the server's parent process."""

    def __init__(self, plan: ServerPlan, number: int):
        self._plan, self._number = plan, number
        self._server: ServerProcess | None = None

    def start(self) -> str:
        """Start the server and return its URL."""
        import ray

        settings = self._plan.settings
        host = ray.util.get_node_ip_address() if settings.host == "node" else settings.host
        sglang = inspect_environment(settings, self._plan.continues_requests)
        check_devices(settings, num_servers=1)  # Ray shows an actor its own GPUs alone, from number 0
        self._plan.folder.mkdir(parents=True, exist_ok=True)
        port = reserve_port(settings, host, self._number)
        self._server = self._plan.build(self._number, host, port, first_gpu=0, sglang=sglang)
        self._server.start()
        return self._server.url

    def alive(self) -> bool:
        return self._server is not None and self._server.alive

    def pid(self) -> int | None:
        return self._server.pid if self._server is not None else None

    def last_words(self) -> str:
        return self._server.last_words() if self._server is not None else "it was not started"

    def last_line(self) -> str:
        return self._server.last_line() if self._server is not None else ""

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()


def start_ray_servers(plan: ServerPlan, address: str | None) -> tuple[list[RayServer], Callable[[], None]]:
    """Start the plan's servers on the cluster. Return them, and a function that disconnects from the cluster.

    Raise ConfigError if Ray is missing, the cluster is out of reach or has no token or no room, or as start_servers does.
    """
    disconnect = connect(address)
    servers = [RayServer(plan, number, plan.settings.start_timeout_s) for number in range(plan.settings.num_servers)]
    try:
        for server in servers:
            server.create()
        for server in servers:
            server.wait_until_started()
    except BaseException:
        disconnect()
        raise
    plan.write_keys()
    return servers, disconnect
