"""The lines that a log file gets, with times by hand; and the bar of a terminal."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

from rich.console import Console

from dapo_mcore.observe.byte_progress import ByteProgress

GB = 1_000_000_000


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def console(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=40)


def told(progress: ByteProgress) -> list[str]:
    return progress.console.file.getvalue().splitlines()


def test_a_line_for_each_tenth() -> None:
    """20 GB at 0.5 GB/s."""
    clock = Clock()
    with ByteProgress("copy", console(), clock) as progress:
        progress.start(20 * GB, 0)
        for _ in range(40):
            clock.now += 1.0
            progress.advance(GB // 2)
    lines = told(progress)
    assert len(lines) == 10
    assert lines[0] == "copy: 2.00 of 20.00 GB, 0.50 GB/s, 36 s left"
    assert lines[-1] == "copy: 20.00 of 20.00 GB, 0.50 GB/s, 0 s left"


def test_bytes_copied_earlier_do_not_count_for_the_speed() -> None:
    clock = Clock()
    with ByteProgress("copy", console(), clock) as progress:
        progress.start(10 * GB, 5 * GB)
        clock.now += 10.0
        progress.advance(GB)
    assert told(progress) == ["copy: continues at 5.00 of 10.00 GB", "copy: 6.00 of 10.00 GB, 0.10 GB/s, 40 s left"]


def test_at_most_a_line_a_second_and_one_at_the_end() -> None:
    clock = Clock()
    with ByteProgress("copy", console(), clock) as progress:
        progress.start(10, 0)
        progress.advance(4)
        clock.now += 1.0
        progress.advance(3)
        progress.advance(2)
        assert len(told(progress)) == 1
        progress.advance(1)
    assert len(told(progress)) == 2


def test_an_empty_copy_prints_nothing() -> None:
    with ByteProgress("copy", console(), Clock()) as progress:
        progress.start(0, 0)
        progress.advance(0)
    assert told(progress) == []


def test_several_threads_may_advance() -> None:
    with ByteProgress("copy", console(), Clock()) as progress, ThreadPoolExecutor(4) as pool:
        progress.start(GB, 0)
        list(pool.map(progress.advance, [GB // 1000] * 1000))
    (line,) = told(progress)  # on a clock that stands still, only the last byte prints one
    assert line.startswith("copy: 1.00 of 1.00 GB")


def test_a_terminal_gets_a_bar_and_no_lines() -> None:
    with ByteProgress("copy", console(terminal=True), Clock()) as progress:
        progress.start(4 * GB, 0)
        progress.advance(2 * GB)
    text = progress.console.file.getvalue()
    assert "copy" in text and "2.0/4.0 GB" in text and "s left" not in text
