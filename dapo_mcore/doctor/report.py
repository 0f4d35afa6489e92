"""The report: lines for the terminal, the worst first, and the same as JSON.

Change here: how findings look. A finding is one line with its remedy, so that it can be searched for in a log.
"""

from __future__ import annotations

import io
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dapo_mcore.doctor.finding import Finding, State
from dapo_mcore.errors import OutputError

_HEADINGS = {
    State.WRONG: ("✗", "wrong: a run cannot start, or fails later", "bold red"),
    State.HINT: ("!", "odd: a run may be slow or fail; look at it", "yellow"),
    State.FALLBACK: ("–", "not in use: something slower does the work, or nothing needs it", "cyan"),
    State.OK: ("✓", "in order", "green"),
}
"""By state, the worst first: its mark, its heading and the style of both."""


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
        return f"✗ {what} cannot run here, for {count} reason{'s' if count > 1 else ''}."


def print_report(report: Report) -> None:
    """Print the report, in colours if the output is a terminal. The verdict is the last line."""
    from rich.console import Console

    encoding = (sys.stdout.encoding or "ascii").lower()
    if isinstance(sys.stdout, io.TextIOWrapper) and not encoding.startswith("utf"):
        sys.stdout.reconfigure(errors="replace")
    console = Console(highlight=False, emoji=False, markup=False, soft_wrap=True)
    all_of = [found for findings in report.groups.values() for found in findings]
    width = max((len(found.name) for found in all_of), default=0)
    for state, (mark, heading, style) in _HEADINGS.items():
        chosen = [found for found in all_of if found.state is state]
        if chosen:
            console.print(f"{mark} {heading}", style=style)
        for found in chosen:
            remedy = f" → {found.remedy}" if found.remedy else ""
            console.print(f"  {found.name:<{width}}  {found.detail}{remedy}")
    console.print(report.verdict, style=_HEADINGS[State.WRONG if report.reasons else State.OK][2])


def in_one_line(found: Finding) -> str:
    return f"{found.name}: {found.detail}{f'; {found.remedy}' if found.remedy else ''}"


def check_json(path: Path) -> None:
    """Raise OutputError if the file cannot be written. What is there stays."""
    existed = path.exists()
    try:
        path.open("a", encoding="utf-8").close()
    except OSError as error:
        raise _unwritable(path, error) from error
    if not existed:
        path.unlink()


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(f"--json {path}: {error.strerror}; name a file in a folder that can be written")


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
        raise _unwritable(path, error) from error
