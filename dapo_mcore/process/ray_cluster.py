"""The Ray cluster that a run places servers and reward workers on: joined with token authentication, without a dashboard.

Change here: how a cluster is joined. Ray runs whatever reaches its ports, which listen on every interface, so a cluster
without a token is refused. Ray's default niceness of 15 would starve servers and rewards beside a trainer on the same
cores, until healthy ones miss their deadlines: a cluster of ours runs them at 0, a given one should be started so.
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
"""Of a cluster of this machine alone: the configuration decides how many share its cores, not Ray's count of them."""


def without_ray(environment: dict[str, str]) -> dict[str, str]:
    """The environment for a child process that must not have the cluster's token."""
    return {name: value for name, value in environment.items() if not name.startswith("RAY_")}


def connect(address: str | None) -> Callable[[], None]:
    """Joins the cluster, or starts one on this machine, and returns what leaves it again.

    Who finds Ray connected already leaves that to whoever connected it. Raises ConfigError: Ray missing, cluster out of
    reach or without a token.
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
    """Ray would exit on SIGTERM with status 15, past whoever handles it."""
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
    # without "local" Ray would join whatever cluster somebody has started on this machine
    return dict(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", num_cpus=_LOCAL_CPUS)


def _given(address: str) -> dict[str, Any]:
    if os.environ.get("RAY_AUTH_MODE") != "token":
        raise ConfigError(
            f"the Ray cluster at {address} would run code for anyone who reaches it; start it with RAY_AUTH_MODE=token "
            "and --include-dashboard=false on every node (and RAY_worker_niceness=0, or a trainer beside them starves "
            "servers and rewards), and set RAY_AUTH_MODE=token and its token here too"
        )
    return dict(address=address)
