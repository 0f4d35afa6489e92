"""Calls of an object's methods over HTTP: who may call which, what comes back, and calls that overlap."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any
from urllib.error import HTTPError

import pytest

from dapo_mcore.errors import ConfigError, RolloutError
from dapo_mcore.rollout.sglang.launch.methods import MethodClient, MethodServer

TOKEN = "c" * 64


class Target:
    def __init__(self) -> None:
        self.opened = threading.Event()

    def add(self, a: int, timeout_s: int) -> int:
        return a + timeout_s

    def fail(self, how: str) -> None:
        raise ConfigError("set b") if how == "config" else RolloutError("no b")

    def wait(self) -> bool:
        return self.opened.wait(30)

    def open(self) -> None:
        self.opened.set()

    def hidden(self) -> None: ...


@pytest.fixture
def server() -> Iterator[MethodServer]:
    made = MethodServer("127.0.0.1", TOKEN, Target(), ("add", "fail", "wait", "open"))
    yield made
    made.close()


def refusal(client: MethodClient, method: str, **arguments: Any) -> tuple[int, str]:
    with pytest.raises(HTTPError) as caught:
        client.call(method, 10.0, **arguments)
    return caught.value.code, json.loads(caught.value.read())


def test_a_method_returns_and_fails_as_it_does_there_also_behind_a_proxy(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    client = MethodClient(server.url, TOKEN)
    assert client.call("add", 10.0, a=1, timeout_s=2) == 3
    assert refusal(client, "fail", how="config") == (422, "set b")
    assert refusal(client, "fail", how="else") == (500, "RolloutError: no b")
    assert refusal(client, "hidden") == (404, "no method hidden")
    assert refusal(MethodClient(server.url, "wrong"), "add", a=1, timeout_s=2) == (401, "wrong token")
    gone = MethodServer("127.0.0.1", TOKEN, Target(), ())
    gone.close()
    with pytest.raises(OSError, match="refused"):
        MethodClient(gone.url, TOKEN).call("add", 10.0)


def test_a_call_is_answered_while_another_one_waits(server):
    client, found = MethodClient(server.url, TOKEN), []
    waiting = threading.Thread(target=lambda: found.append(client.call("wait", 60.0)))
    waiting.start()
    client.call("open", 10.0)
    waiting.join(60)
    assert found == [True]
