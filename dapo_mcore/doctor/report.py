"""The report: a table for the terminal, and the same as JSON.

Change here: how findings look. The table has 100 columns, wherever it is printed.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dapo_mcore.doctor.finding import Finding, State
from dapo_mcore.errors import OutputError

_WIDTH = 100
_COLUMNS = (12, 18, _WIDTH - 12 - 18 - 6)
_MARKS = {State.OK: "✓ ok", State.FALLBACK: "– falls back", State.HINT: "– hint", State.WRONG: "✗ wrong"}
_STYLES = {State.OK: "green", State.FALLBACK: "yellow", State.HINT: "yellow", State.WRONG: "bold red"}


@dataclass(frozen=True)
class Report:
    """All findings, in groups, about a configuration (None: about the machine alone).

    groups  title of a group → its findings; facts: numbers for the JSON file only
    """

    config: str | None
    groups: dict[str, list[Finding]]
    facts: dict[str, Any]

    @property
    def reasons(self) -> list[Finding]:
        """What stands in the way of a run."""
        return [found for findings in self.groups.values() for found in findings if found.state is State.WRONG]

    @property
    def verdict(self) -> str:
        what, count = self.config or "A run", len(self.reasons)
        if not count:
            return f"✓ {what} can run here." if self.config else "✓ Nothing stands in the way of a run here."
        return f"✗ {what} cannot run here, for {count} reason{'s' if count > 1 else ''}:"


def print_report(report: Report) -> None:
    """Print the report, in colours if the output is a terminal."""
    from rich.console import Console

    encoding = (sys.stdout.encoding or "ascii").lower()
    if isinstance(sys.stdout, io.TextIOWrapper) and not encoding.startswith("utf"):
        sys.stdout.reconfigure(errors="replace")
    console = Console(width=_WIDTH, highlight=False, emoji=False, markup=False)
    for title, findings in report.groups.items():
        console.rule(title, align="left", characters="─", style="dim")
        console.print(_table(findings))
        console.print()
    console.print(report.verdict, style=_STYLES[State.WRONG if report.reasons else State.OK], soft_wrap=True)
    for number, found in enumerate(report.reasons, 1):
        console.print(f"  {number}. {in_one_line(found)}", soft_wrap=True)


def _table(findings: Sequence[Finding]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for width in _COLUMNS:
        table.add_column(width=width, overflow="fold")
    for found in findings:
        detail = Text(found.detail)
        if found.remedy:
            detail.append(f"\n→ {found.remedy}", style="cyan")
        table.add_row(Text(_MARKS[found.state], style=_STYLES[found.state]), Text(found.name), detail)
    return table


def in_one_line(found: Finding) -> str:
    return f"{found.name}: {found.detail}{f'; {found.remedy}' if found.remedy else ''}"


def write_json(report: Report, path: Path) -> None:
    """Write {"config", "can_run", "findings": [{"group", "name", "state", "detail", "remedy"}], …facts}."""
    findings = [
        {"group": title, **asdict(found), "state": found.state.value}
        for title, found_here in report.groups.items()
        for found in found_here
    ]
    content = {"config": report.config, "can_run": not report.reasons, "findings": findings, **report.facts}
    try:
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"--json {path}: {error.strerror}; name a file in a folder that can be written") from error
