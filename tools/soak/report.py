"""What the soak prints and writes: a line per event, one live line, and the summary.

Change here: the words.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.soak.rounds import Outcome, RoundResult

_LIVE_S = 0.5
_LIVE_IN_A_LOG_S = 60.0


class Report:
    """Prints with the seconds since the start of the soak."""

    def __init__(self) -> None:
        self._begin, self._shown_at = time.monotonic(), 0.0
        self._is_terminal = sys.stdout.isatty()

    def line(self, text: str) -> None:
        self._print(f"{self._seconds():7.1f} s  {text}", end="\n")

    def outcome(self, outcome: Outcome) -> None:
        self.line(f"{outcome.kind:<16}{outcome.at}: {followed(outcome)}")

    def show(self, state: str) -> None:
        """Show the state of the soak, in place of the one before. Where the output is no terminal, print it once a minute."""
        now = time.monotonic()
        if now - self._shown_at >= (_LIVE_S if self._is_terminal else _LIVE_IN_A_LOG_S):
            self._shown_at = now
            self._print(f"{self._seconds():7.1f} s  … {state}", end="" if self._is_terminal else "\n")

    def _seconds(self) -> float:
        return time.monotonic() - self._begin

    def _print(self, text: str, end: str) -> None:
        print(f"\r\x1b[K{text}" if self._is_terminal else text, end=end, flush=True)


def followed(outcome: Outcome) -> str:
    """Return in words what followed an event."""
    if outcome.left_out and outcome.status is None:
        return f"left out, as {outcome.left_out}"
    parts = [f"left out, as {outcome.left_out}"] if outcome.left_out else []
    after = "" if outcome.exit_s is None else f" after {outcome.exit_s:.1f} s"
    parts.append("the job goes on" if outcome.status is None else f"torchrun ends with {outcome.status}{after}")
    if outcome.next_s is not None:
        parts.append(f"next step done after {outcome.next_s:.1f} s")
    if outcome.repeated:
        parts.append(f"{outcome.repeated} step{'s' if outcome.repeated > 1 else ''} again")
    return "; ".join(parts) + (f': "{outcome.words[:160]}"' if outcome.words else "")


def summary(rounds: Sequence[RoundResult], reference_s: float) -> str:
    """Return the table of events by kind, and the verdict as its last line."""
    outcomes = [outcome for result in rounds for outcome in result.outcomes]
    lines = [f"{'event':<18}{'done':>5}{'left out':>10}{'ended':>7}{'exit, s':>9}{'next step, s':>14}{'again':>7}"]
    lines += [_row(kind, [o for o in outcomes if o.kind == kind]) for kind in sorted({o.kind for o in outcomes})]
    equal, lost = [r for r in rounds if not r.problems], sum(result.seconds - reference_s for result in rounds)
    starts, repeated = sum(result.starts for result in rounds), sum(o.repeated for o in outcomes)
    lines.append(
        f"{len(rounds)} rounds, {starts} starts of torchrun, {sum(not o.left_out for o in outcomes)} events, "
        f"{repeated} steps done again, {lost:.0f} s lost"
    )
    lines += [f"round {result.number}: {problem}" for result in rounds for problem in result.problems]
    is_equal = len(equal) == len(rounds)
    lines.append(
        f"{'EQUAL' if is_equal else 'NOT EQUAL'}: {len(equal)} of {len(rounds)} rounds ended as the undisturbed run"
    )
    return "\n".join(lines)


def write(path: Path, rounds: Sequence[RoundResult], **more: Any) -> None:
    """Write everything as JSON."""
    records = [result._asdict() | {"outcomes": [o._asdict() for o in result.outcomes]} for result in rounds]
    path.write_text(json.dumps({**more, "rounds": records}, indent=1) + "\n", encoding="utf-8")


def _row(kind: str, outcomes: Sequence[Outcome]) -> str:
    done = [outcome for outcome in outcomes if not outcome.left_out]
    exits, nexts = ([getattr(o, name) for o in done if getattr(o, name) is not None] for name in ("exit_s", "next_s"))
    ended, again = sum(o.status is not None for o in done), sum(o.repeated for o in done)
    return f"{kind:<18}{len(done):>5}{len(outcomes) - len(done):>10}{ended:>7}{_mean(exits):>9}{_mean(nexts):>14}{again:>7}"


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.1f}" if values else "-"
