"""How a Ray cluster is joined: never without a token. Ray itself is played by a module of this test."""

from __future__ import annotations

import os
import signal
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from dapo_mcore.errors import ConfigError
from dapo_mcore.process.ray_cluster import connect, without_ray

VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_worker_niceness")


class FakeRay:
    """What connect asks of Ray. `fails`: the error of its start."""

    exceptions = SimpleNamespace(AuthenticationError=type("AuthenticationError", (Exception,), {}))

    def __init__(self, connected: bool = False, fails: Exception | None = None):
        self.connected, self.fails = connected, fails
        self.started: list[dict[str, Any]] = []

    def is_initialized(self) -> bool:
        return self.connected

    def init(self, **options: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as Ray puts its own handler there
        self.started.append(options)
        if self.fails:
            raise self.fails
        self.connected = True

    def shutdown(self) -> None:
        self.connected = False


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Ray imported, and none of its variables set; both are restored."""
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "ray")
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        del os.environ[name]


def imported(monkeypatch: pytest.MonkeyPatch, ray: FakeRay) -> FakeRay:
    """The module that `import ray` gives from now on. RAY_AUTH_MODE is set, since Ray counts as imported."""
    monkeypatch.setitem(sys.modules, "ray", ray)
    os.environ["RAY_AUTH_MODE"] = "token"
    return ray


def test_a_child_process_gets_none_of_rays_variables() -> None:
    environment = {"RAY_AUTH_TOKEN": "secret", "PATH": "/bin", "ARRAY_SIZE": "3"}
    assert without_ray(environment) == {"PATH": "/bin", "ARRAY_SIZE": "3"}
    assert "RAY_AUTH_TOKEN" in environment


def test_a_cluster_of_this_machine_has_a_token_listens_on_loopback_and_starves_no_worker(monkeypatch) -> None:
    ray = imported(monkeypatch, FakeRay())
    before = signal.getsignal(signal.SIGTERM)
    disconnect = connect(None)
    (options,) = ray.started
    assert (options["address"], options["_node_ip_address"], options["include_dashboard"]) == (
        "local",
        "127.0.0.1",
        False,
    )
    assert os.environ["RAY_AUTH_MODE"] == "token" and os.environ[VARIABLES[2]] == "0"
    assert len(bytes.fromhex(os.environ["RAY_AUTH_TOKEN"])) == 32
    assert signal.getsignal(signal.SIGTERM) is before
    disconnect()
    assert not ray.connected


def test_a_cluster_that_is_connected_already_is_left_connected(monkeypatch) -> None:
    ray = imported(monkeypatch, FakeRay(connected=True))
    connect("10.0.0.1:6379")()
    assert ray.started == [] and ray.connected


def test_a_given_cluster_without_a_token_is_refused_before_ray_is_asked() -> None:
    with pytest.raises(
        ConfigError, match=r"cluster at 10\.0\.0\.1:6379 would run code for anyone who reaches it; start it"
    ):
        connect("10.0.0.1:6379")


def test_ray_that_was_imported_without_a_token_is_refused(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", FakeRay())
    with pytest.raises(ConfigError, match="Ray was imported without RAY_AUTH_MODE=token"):
        connect(None)


@pytest.mark.parametrize(
    "error", [ConnectionError("nobody there"), FakeRay.exceptions.AuthenticationError("wrong token")]
)
def test_a_cluster_that_cannot_be_joined_is_named(monkeypatch, error: Exception) -> None:
    ray = imported(monkeypatch, FakeRay(fails=error))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ConfigError, match=f"the Ray cluster at ray.address h:1 cannot be used: {error}"):
        connect("h:1")
    assert [options["address"] for options in ray.started] == ["h:1"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_machine_without_ray_is_told_what_to_install(monkeypatch) -> None:
    os.environ["RAY_AUTH_MODE"] = "token"
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="pip install ray"):
        connect("h:1")
