from __future__ import annotations

import socket

import pytest

from dapo_mcore.doctor import network
from dapo_mcore.doctor.finding import State

NAMES = ["docker0", "eth0", "ib0", "lo"]
ADDRESSES = {"lo": ["127.0.0.1", "00:00:00:00:00:00"], "eth0": ["02:42:ac:11:00:02", "10.0.0.1"]}


@pytest.mark.parametrize(
    ("environment", "hosts", "detail", "remedy"),
    [
        ({"http_proxy": "http://p:1"}, [], "does not name 127.0.0.1, localhost", "no_proxy=127.0.0.1,localhost"),
        (
            {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "localhost,127.0.0.1"},
            ["10.0.0.7"],
            "does not name 10.0.0.7",
            "export no_proxy=127.0.0.1,localhost,10.0.0.7",
        ),
        (
            {"http_proxy": "http://p:1", "no_proxy": "localhost, 127.0.0.1, 10.0.0.0/8"},
            ["10.0.0.7"],
            "does not name 10.0.0.7 and most programs ignore 10.0.0.0/8",
            "export no_proxy",
        ),
    ],
)
def test_a_proxy_that_takes_calls_of_the_run_is_a_hint(environment, hosts, detail: str, remedy: str) -> None:
    found = network.check_proxies(environment, hosts)
    assert (found.state, detail in found.detail, remedy in found.remedy) == (State.HINT, True, True), found


def test_without_a_proxy_or_with_exceptions_nothing_is_odd() -> None:
    assert network.check_proxies({}).state is State.OK
    assert network.check_proxies({"http_proxy": "http://p:1", "no_proxy": "*"}, ["10.0.0.7"]).state is State.OK
    assert network.check_proxies({"http_proxy": "", "no_proxy": ""}).detail == "none"


@pytest.mark.parametrize(
    ("given", "state"),
    [("eth0", State.OK), ("eth0,ib0", State.OK), ("^lo", State.WRONG), ("=eth0", State.WRONG), ("eth", State.WRONG)],
)
def test_gloo_takes_whole_names_of_interfaces(given: str, state: State) -> None:
    (found,) = network.check_interfaces({"GLOO_SOCKET_IFNAME": given}, NAMES, on_gpu=False)
    assert found.state is state
    if state is State.WRONG:
        assert (found.name, found.detail) == ("GLOO_SOCKET_IFNAME", f"{given!r} fits none of docker0, eth0, ib0, lo")
        assert "gloo knows no ^ and no =" in found.remedy


@pytest.mark.parametrize(
    ("given", "allowed"),
    [
        ("eth", ["eth0"]),
        ("=eth", []),
        ("=eth0,ib0", ["eth0", "ib0"]),
        ("^docker,lo", ["eth0", "ib0"]),
        ("^=eth0", ["docker0", "ib0", "lo"]),
        ("ens", []),
    ],
)
def test_nccl_takes_beginnings_and_exceptions(given: str, allowed: list[str]) -> None:
    assert network.nccl_interfaces(given, NAMES) == allowed
    (found,) = network.check_interfaces({"NCCL_SOCKET_IFNAME": given}, NAMES, on_gpu=True)
    assert found.state is (State.OK if allowed else State.WRONG)
    assert network.check_interfaces({"NCCL_SOCKET_IFNAME": given}, NAMES, on_gpu=False) == []


def test_gloo_listens_where_its_variable_or_the_host_name_says(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"good": "10.0.0.1", "debian": "127.0.1.1", "elsewhere": "10.9.9.9"}

    def resolve(host: str, *_: object, **__: object) -> list[tuple]:
        if host not in names:
            raise socket.gaierror("unknown")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (names[host], 0))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    found = [network.gloo_address({}, ADDRESSES, host) for host in (*names, "nobody")]
    assert found == ["10.0.0.1", "127.0.1.1", "127.0.0.1", "127.0.0.1"], "it falls back to loopback"
    assert network.gloo_address({"GLOO_SOCKET_IFNAME": "eth0"}, ADDRESSES, "debian") == "10.0.0.1"
    assert network.gloo_address({"GLOO_SOCKET_IFNAME": "eth7"}, ADDRESSES, "debian") == "127.0.0.1"


def test_a_node_that_others_cannot_reach_is_named_with_its_address() -> None:
    loopback, firewall = network.check_reach(
        [
            ("n0", "n1", "127.0.1.1", "Connection refused"),
            ("n2", "n1", "127.0.1.1", "Connection refused"),
            ("n1", "n2", "10.0.0.2", "timed out"),
        ]
    )
    assert {loopback.state, firewall.state} == {State.WRONG}
    assert loopback.detail == (
        "n0, n2 cannot reach n1 at 127.0.1.1: Connection refused; n1 gives others its loopback address"
    )
    assert "GLOO_SOCKET_IFNAME" in loopback.remedy and "/etc/hosts" in loopback.remedy
    assert firewall.detail == "n1 cannot reach n2 at 10.0.0.2: timed out"
    assert "on all ports" in firewall.remedy
