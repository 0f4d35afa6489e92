"""The start of servers: what a user sees meanwhile (whole lines in a pipe, a count and the seconds on a terminal), and which given
servers and routers a run refuses."""

from __future__ import annotations

import asyncio
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from aiohttp import web
from rich.console import Console

from dapo_mcore.config.sglang import SGLangConfig
from dapo_mcore.errors import ConfigError
from dapo_mcore.observe.progress import Progress
from dapo_mcore.rollout.sglang.assembly import probe_router, shown_startup
from dapo_mcore.rollout.sglang.client import versions
from dapo_mcore.rollout.sglang.client.api import Keys, ServerClient
from dapo_mcore.rollout.sglang.client.http import HttpClient
from dapo_mcore.rollout.sglang.engine import SGLangEngine
from dapo_mcore.rollout.sglang.launch.servers import reserve_port
from tests.rollout.sglang.fake_server import fake_python
from tests.rollout.sglang.serving import STOP, Raw, bare_server, engine, key_file, settings, tiny_config


class Screen:
    """A run's progress on a console that can be read, and a clock that the test moves."""

    def __init__(self, is_terminal: bool) -> None:
        self.console = Console(file=io.StringIO(), width=100, force_terminal=is_terminal, highlight=False)
        self.now = 0.0
        self.progress = Progress("run", 2, self.console)

    def display(self) -> str:
        with self.console.capture() as capture:
            self.console.print(self.progress)
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capture.get())

    def lines(self) -> list[str]:
        return self.console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_a_pipe_gets_a_line_at_the_start_and_one_at_the_end() -> None:
    screen = Screen(is_terminal=False)
    with shown_startup(
        screen.progress, SGLangConfig(num_servers=2), Path("runs/a/servers"), lambda: screen.now
    ) as startup:
        assert screen.lines() == ["starting 2 SGLang servers (logs in runs/a/servers)"]
        startup.is_up()
        screen.now = 38.4
        startup.is_up()
    assert screen.lines()[1:] == ["2 of 2 SGLang servers up after 38s"]


def test_a_terminal_counts_the_servers_that_are_up_and_the_seconds() -> None:
    screen = Screen(is_terminal=True)
    with shown_startup(screen.progress, SGLangConfig(num_servers=2), Path("servers")) as startup:
        startup.is_up()
        assert re.search(r"servers .* 1/2 0:0\d:\d\d", screen.display())
    assert "servers" not in screen.display()


def test_given_servers_have_no_line_that_says_they_start() -> None:
    screen = Screen(is_terminal=False)
    with shown_startup(screen.progress, SGLangConfig(urls=["http://a:1"]), Path("servers")) as startup:
        startup.is_up()
    assert screen.lines() == []


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_long_start_shows_its_progress_every_half_minute(device: str) -> None:
    """The first start on a GPU compiles kernels (107 s on an H100). A user must not take that for a hang."""
    screen, settings = Screen(is_terminal=False), SGLangConfig(num_servers=2, device=device)
    server = SimpleNamespace(url="http://a:1", last_line=lambda: "Capturing graphs" if screen.now > 45 else "")
    with shown_startup(screen.progress, settings, Path("servers"), lambda: screen.now) as startup:
        for screen.now in (0.2, 29.9, 30.1, 30.3, 59.9, 60.1):
            asyncio.run(startup.waiting(server))
        startup.is_up()
        screen.now = 107.0
    hint = " (a first start on a machine compiles kernels, about two minutes)" if device == "cuda" else ""
    assert screen.lines()[1:-1] == [
        f"0 of 2 servers up after 30s{hint}; http://a:1 has written nothing yet",
        f"0 of 2 servers up after 1m00s{hint}; http://a:1 last wrote: Capturing graphs",
    ]


def start(folder: Path, screen: Screen, python: Path) -> None:
    SGLangEngine(
        settings(python, num_servers=2, sync_dir=str(folder)),
        tiny_config(),
        stop_token_ids=(STOP,),
        dtype=torch.float32,
        folder=folder / "servers",
        progress=screen.progress,
    ).close()


def test_an_engine_shows_its_servers_start(tmp_path: Path) -> None:
    screen = Screen(is_terminal=False)
    start(tmp_path, screen, fake_python(tmp_path))
    begun, up = screen.lines()
    assert begun == f"starting 2 SGLang servers (logs in {tmp_path / 'servers'})"
    assert re.fullmatch(r"2 of 2 SGLang servers up after \d+s", up)


def test_servers_that_cannot_start_have_no_line_that_says_they_are_up(tmp_path: Path) -> None:
    screen = Screen(is_terminal=False)
    with pytest.raises(ConfigError, match=r"has SGLang 0\.5\.14"):
        start(tmp_path, screen, fake_python(tmp_path, "0.5.14"))
    assert len(screen.lines()) == 1


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Raw]:
    folder = tmp_path_factory.mktemp("running")
    with bare_server(fake_python(folder), folder / "servers") as raw:
        yield raw


def attach(folder: Path, url: str, hf_config: Any = None, **changes: Any) -> None:
    """Start an engine on a given server, and close it."""
    given = settings(Path(sys.executable), urls=[url], **changes)
    common = dict(stop_token_ids=(STOP,), dtype=torch.float32, folder=folder / "other")
    SGLangEngine(given, hf_config or tiny_config(), **common).close()


def test_a_given_server_is_accepted_with_its_keys(running, tmp_path):
    attach(tmp_path, running.url, key_file=key_file(tmp_path, running.keys.api, running.keys.admin))


@pytest.mark.parametrize(
    ("api", "admin"), [(None, None), ("wrong", "wrong"), ("right", "wrong"), ("right", "right api")]
)
def test_a_refused_key_is_explained(running, tmp_path, api, admin):
    right = {"right": running.keys.api, "right api": running.keys.api}
    keys = key_file(tmp_path, right.get(api, api), right.get(admin, admin))
    with pytest.raises(
        ConfigError, match=r"refused with HTTP 401: Unauthorized; give the server's api_key and admin_key"
    ):
        attach(tmp_path, running.url, key_file=keys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(vocab_size=96), "serves a model with vocab_size 64 .*, but model.path has 96"),
        (dict(hidden_size=32), "serves a model with hidden_size 64 .*, but model.path has 32"),
    ],
)
def test_another_model_on_the_server_is_refused(running, tmp_path, changes, message):
    keys = key_file(tmp_path, running.keys.api, running.keys.admin)
    with pytest.raises(ConfigError, match=message):
        attach(tmp_path, running.url, tiny_config(**changes), key_file=keys)


def test_the_error_names_a_server_that_is_not_there(tmp_path):
    with reserve_port(SGLangConfig(), "127.0.0.1", 0) as port:
        url = f"http://127.0.0.1:{port.getsockname()[1]}"
        told = f"no SGLang server answers: {url}.*; start it, or correct rollout.sglang.urls"
        with pytest.raises(ConfigError, match=told):
            attach(tmp_path, url)


def test_a_given_server_that_is_too_old_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(versions, "OLDEST", (0, 0, 1))
    with bare_server(fake_python(tmp_path, "0.5.9"), tmp_path / "servers") as old:
        monkeypatch.setattr(versions, "OLDEST", (0, 5, 15))
        with pytest.raises(ConfigError, match=r"has SGLang 0\.5\.9, but weight updates need at least 0\.5\.15"):
            attach(tmp_path, old.url, key_file=key_file(tmp_path, old.keys.api, old.keys.admin))


@pytest.mark.parametrize("version", ["0.5.21", "0.5.15"])
def test_verify_sync_refuses_servers_that_cannot_report_checksums(tmp_path, version):
    python = fake_python(tmp_path, version)
    refused = pytest.raises(ConfigError, match=r"tells no checksums .*set verify_sync off")
    with refused, engine(tmp_path, python=python, num_servers=2, verify_sync="servers"):
        pass


URLS = ["http://a:1", "http://b:2/"]


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        (["http://a:1", "http://b:2@0", "http://b:2@1"], None),
        (
            ["http://a:1", "http://b:2", "http://c:3"],
            r"to 1 servers that .* does not list \(http://c:3\), and not to 0",
        ),
        (["http://a:1"], r"to 0 servers .* \(none\), and not to 1 that it does \(http://b:2\); list the same servers"),
        (None, None),
    ],
)
def test_a_router_that_knows_other_servers_than_the_urls_is_refused(workers, message):
    if message is None:
        ask(workers)
    else:
        with pytest.raises(ConfigError, match=message):
            ask(workers)


def ask(workers: list[str] | None) -> None:
    """Probe a router that reports these workers. None: it has no such call."""

    async def tell(request: web.Request) -> web.Response:
        return web.json_response({"workers": [{"url": url} for url in workers]})

    async def run() -> None:
        app = web.Application()
        if workers is not None:
            app.router.add_get("/workers", tell)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        client = HttpClient(30.0, 30.0)
        try:
            await probe_router(router_at(client, runner.addresses[0][1]), URLS)
        finally:
            await client.close()
            await runner.cleanup()

    asyncio.run(run())


def router_at(client: HttpClient, port: int) -> ServerClient:
    return ServerClient(client, f"http://127.0.0.1:{port}", Keys(), 30.0)


def test_the_error_names_a_router_that_is_not_there():
    async def run(port: int) -> None:
        client = HttpClient(30.0, 30.0)
        try:
            await probe_router(router_at(client, port), URLS)
        finally:
            await client.close()

    message = r"no router answers: .*; start it, or correct rollout\.sglang\.router_url"
    with reserve_port(SGLangConfig(), "127.0.0.1", 0) as port, pytest.raises(ConfigError, match=message):
        asyncio.run(run(port.getsockname()[1]))
