"""What a user sees while servers start: whole lines in a pipe, a count and the seconds on a terminal."""

from __future__ import annotations

import asyncio
import io
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from dapo_mcore.config.sglang import SGLangConfig
from dapo_mcore.errors import ConfigError
from dapo_mcore.observe.progress import Progress
from dapo_mcore.rollout.sglang.assembly import shown_startup
from dapo_mcore.rollout.sglang.engine import SGLangEngine
from tests.rollout.sglang.fake_server import fake_python
from tests.rollout.sglang.serving import STOP, settings, tiny_config


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


def test_given_servers_are_not_said_to_be_started() -> None:
    screen = Screen(is_terminal=False)
    with shown_startup(screen.progress, SGLangConfig(urls=["http://a:1"]), Path("servers")) as startup:
        startup.is_up()
    assert screen.lines() == []


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_long_start_says_every_half_minute_how_it_goes(device: str) -> None:
    """The first on a GPU compiles kernels, which took 107 s on an H100: nobody should take that for a hang."""
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


def test_servers_that_cannot_start_are_not_said_to_be_up(tmp_path: Path) -> None:
    screen = Screen(is_terminal=False)
    with pytest.raises(ConfigError, match=r"has SGLang 0\.5\.14"):
        start(tmp_path, screen, fake_python(tmp_path, "0.5.14"))
    assert len(screen.lines()) == 1
