"""The Ray cluster on which a run starts servers and reward workers. It needs token authentication and has no dashboard.

Change here: how a cluster is joined. Ray runs any code that reaches its ports, and these listen on every interface, so a
cluster without a token is refused. Ray's default niceness of 15 starves servers and reward workers that share cores with
the trainer, until healthy ones miss their deadlines. A cluster that we start runs them at 0; start other clusters so, too.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dapo_mcore.errors import ConfigError

_LOCAL_CPUS = 1024
"""CPUs of a cluster on this machine. It is high because the configuration, and not Ray, limits the number of processes."""


def without_ray(environment: dict[str, str]) -> dict[str, str]:
    """Return the environment without Ray's variables, for a child process that must not have the cluster's token."""
    return {name: value for name, value in environment.items() if not name.startswith("RAY_")}


def connect(address: str | None) -> Callable[[], None]:
    """Join the cluster at `address`, or start one on this machine for None. Return the function that disconnects again.

    If this process is connected already, do nothing and return a function that does nothing. Raise ConfigError if Ray is
    missing, or if the cluster cannot be reached or has no token.
    """
    where = _local() if address is None else _given(address)
    try:
        import ray
    except ImportError as error:
        raise ConfigError("placement ray needs Ray: pip install ray") from error
    if ray.is_initialized():
        return lambda: None
    try:
        with _sigterm_kept():
            ray.init(**where, log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
        raise ConfigError(f"the Ray cluster at ray.address {address} cannot be used: {error}") from error
    return ray.shutdown


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Keep the process's SIGTERM handler: ray.init installs one that exits with status 15."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _local() -> dict[str, Any]:
    if "ray" in sys.modules and os.environ.get("RAY_AUTH_MODE") != "token":
        raise ConfigError("Ray was imported without RAY_AUTH_MODE=token, which it reads once; set it before the start")
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_worker_niceness", "0")
    # without "local" Ray would join any cluster that runs on this machine
    return dict(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", num_cpus=_LOCAL_CPUS)


def _given(address: str) -> dict[str, Any]:
    if os.environ.get("RAY_AUTH_MODE") != "token":
        raise ConfigError(
            f"the Ray cluster at {address} would run code for anyone who reaches it; start it with RAY_AUTH_MODE=token "
            "and --include-dashboard=false on every node (and RAY_worker_niceness=0, or a trainer beside them starves "
            "servers and rewards), and set RAY_AUTH_MODE=token and its token here too"
        )
    return dict(address=address)
