"""Which addresses are this machine's. 192.0.2.0/24 is reserved for documentation: no machine has an address in it."""

from __future__ import annotations

import socket

import pytest

from dapo_mcore.rollout.sglang.sync.address import is_loopback, on_other_machines, unreachable


def test_servers_on_other_machines_are_returned_in_order():
    here = ["http://127.0.0.1:30000", "http://localhost:30001", "http://[::1]:30002", "http://127.0.0.9:1"]
    far = ["http://192.0.2.7:30000", "http://192.0.2.8"]
    assert on_other_machines([far[0], *here, far[1]]) == far


def test_a_name_that_nobody_knows_is_of_another_machine(monkeypatch):
    def unknown(*_: object, **__: object) -> list:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert on_other_machines(["http://nowhere.invalid:1"]) == ["http://nowhere.invalid:1"]
    assert not is_loopback("nowhere.invalid")


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.3.2.1", True),
        ("localhost", True),
        ("::1", True),
        ("192.0.2.7", False),
        ("0.0.0.0", False),
    ],
)
def test_loopback_is_every_address_that_means_the_machine_itself(host, loopback):
    assert is_loopback(host) == loopback


def test_a_name_with_one_address_elsewhere_is_not_loopback(monkeypatch):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (ip, 0)) for ip in ("127.0.0.1", "192.0.2.7")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert not is_loopback("both")


def test_servers_that_take_no_connection_from_an_address_are_returned():
    with socket.create_server(("127.0.0.1", 0)) as up, socket.create_server(("127.0.0.1", 0)) as down:
        urls = [f"http://127.0.0.1:{server.getsockname()[1]}" for server in (up, down)]
        down.close()
        assert unreachable(urls, "127.0.0.2", 5.0) == urls[1:]
        assert unreachable(urls, "192.0.2.7", 5.0) == urls, "an address that this machine has not"
    assert unreachable([], "127.0.0.1", 5.0) == []
