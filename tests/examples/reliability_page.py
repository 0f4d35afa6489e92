"""The table of examples/reliability.md: faults, and what a run says."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "examples/reliability.md"


@cache
def messages() -> dict[str, list[list[str]]]:
    """Return {fault: messages}, each as its fixed parts: `…` stands for what differs between runs."""
    return {
        cells[0]: [
            [part.strip() for part in told.split("…") if part.strip()] for told in re.findall("`([^`]+)`", cells[1])
        ]
        for cells in table(PAGE, "fault")
    }


def table(page: Path, first_column: str) -> list[list[str]]:
    """Return the cells of the page's table whose first column has this head, without head and rule."""
    text = page.read_text(encoding="utf-8")
    (rows,) = re.findall(rf"^\| {first_column} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows.splitlines()]


def assert_told(fault: str, output: str) -> None:
    """Assert that a run has said everything that the page's table promises for the fault. Blanks in `output` are single ones."""
    for parts in messages()[fault]:
        pattern = ".*".join(map(re.escape, parts))
        assert re.search(pattern, output), f"not said: {' … '.join(parts)}\n{output}"
