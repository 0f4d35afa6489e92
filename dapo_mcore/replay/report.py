"""What `dapo-mcore explain` prints: sentences for people, a table of checks, and the same as JSON.

Change here: the words.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from textwrap import TextWrapper
from typing import Any

from dapo_mcore.errors import output_error, shortened
from dapo_mcore.replay.compare import Check, Verdict
from dapo_mcore.replay.explain import Explanation, Found, explain, span

_MOST_SETTINGS = 6
_LONGEST_VALUE = 60
_NARROWEST, _WIDEST = 80, 100


def run(a: Path, b: Path, step: int | None, json_file: Path | None) -> int:
    """Print where two runs begin to differ. Return 1 if they differ beyond rounding, else 0, as a replay does. Raise RecordError as
    `explain` does."""
    found = explain(a, b, step)
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(_finite(as_json(found)), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise output_error(error, f"write {json_file}") from error
    width = min(_WIDEST, max(_NARROWEST, shutil.get_terminal_size((_NARROWEST, 24)).columns))
    print(*report(found, width), sep="\n")
    return int(found.verdict is Verdict.DIFFERS)


def report(found: Explanation, width: int) -> list[str]:
    """Return the lines of a screen of `width` columns."""
    lines = [line for sentence in sentences(found) for line in _folded(sentence, width)]
    if found.verdict is not Verdict.EQUAL or len(found.steps) == 1:
        lines += ["", f"Step {found.shown}", *_table(found.checks, width)]
    return lines


def sentences(found: Explanation) -> list[str]:
    """Return the outcome, what is equal before it, the settings, and what was not compared."""
    return [*filter(None, [_outcome(found), _before(found), _settings(found), *found.notes])]


def _outcome(found: Explanation) -> str:
    both, over = f"{found.a} and {found.b}", f"rollout {span(found.steps)}"
    if found.beyond is not None:
        return f"{both} first differ in {_where(found.beyond)}."
    if found.first is None:
        return f"{both} are equal in {over}."
    return f"{both} differ only in rounding in {over}, by at most {found.rounding:.1e}; first in {_where(found.first)}."


def _where(found: Found) -> str:
    return f"rollout step {found.step}, {found.check.name}: {found.check.detail}"


def _before(found: Explanation) -> str:
    """Return what is said of everything before the first difference."""
    if found.beyond is None:
        return ""
    if found.first != found.beyond:
        return f"Before that they differ only in rounding, by at most {found.rounding:.1e}; first in {_where(found.first)}."
    whole = found.steps[: found.steps.index(found.beyond.step)]
    rows = _rows(found.checks, found.beyond.check)
    before = rows[: rows.index(found.beyond.check)]
    equal = ", ".join(row.name for row in before if row.verdict is Verdict.EQUAL)
    parts = [*([span(whole)] if whole else []), *([f"in step {found.beyond.step} {equal}"] if equal else [])]
    return f"Before that all is equal: {'; '.join(parts)}." if parts else ""


def _settings(found: Explanation) -> str:
    if not found.settings:
        return "No setting differs."
    told = [f"{own.name} {' against '.join(_values(own.a, own.b))}" for own in found.settings[:_MOST_SETTINGS]]
    more = len(found.settings) - len(told)
    return f"Settings that differ: {'; '.join(told)}{f'; and {more} more (see --json)' if more else ''}."


def _values(a: Any, b: Any) -> list[str]:
    """Return two values, shortened to where they differ."""
    texts = ["none" if value is None else str(value) for value in (a, b)]
    alike = next((place for place, pair in enumerate(zip(*texts)) if pair[0] != pair[1]), min(map(len, texts)))
    start = max(0, alike - _LONGEST_VALUE // 2) if max(map(len, texts)) > _LONGEST_VALUE else 0
    return [f"{'…' if start else ''}{shortened(text[start:], _LONGEST_VALUE)}" for text in texts]


def _table(checks: list[Check], width: int) -> Iterator[str]:
    """Yield a line for each row. What differs after the first difference follows from it, as far as anyone can tell."""
    first = next((check for check in checks if check.verdict is Verdict.DIFFERS), None)
    rows = _rows(checks, first)
    column = max(len(check.name) for check in rows)
    for check in rows:
        if check is first:
            word, detail = "DIFFERS", "see above"
        else:
            word, detail = "follows" if check.verdict is Verdict.DIFFERS else check.verdict.value, check.detail
        start = f"  {check.name:{column}}  {word:12}  "
        yield from _folded(detail, width - 1, start) or [start.rstrip()]


def _rows(checks: Sequence[Check], first: Check | None) -> list[Check]:
    """Return a check for each row: gradient steps that are alike share one, and so do neighbours of a step with one verdict."""
    verdicts: dict[str, set[Verdict]] = {}
    for check in checks:
        verdicts.setdefault(_update(check), set()).add(check.verdict)
    alone = {update for update, found in verdicts.items() if len(found) > 1} | ({_update(first)} if first else set())
    rows = []
    for _, group in groupby(checks, lambda own: (own is first, own.verdict, _row_of(own, alone))):
        some = list(group)
        if len(some) > 1:
            detail = "" if some[0].verdict is Verdict.EQUAL else some[0].detail
            some = [replace(some[0], name=_shared_name(some), detail=detail)]
        rows += some
    return rows


def _update(check: Check) -> str:
    """Return the gradient step that a check is about: `update 2`; empty if it is about none."""
    return check.name.partition(": ")[0] if check.name.startswith("update ") else ""


def _row_of(check: Check, alone: set[str]) -> str:
    """Return a key that checks of one row share."""
    return check.name if not (update := _update(check)) else update if update in alone else "update"


def _shared_name(checks: Sequence[Check]) -> str:
    """Return one name for checks of gradient steps: `update 2: gradient, metrics`, `updates 1 to 4`."""
    first, last = _update(checks[0]), _update(checks[-1])
    if first != last:
        return f"updates {first.removeprefix('update ')} to {last.removeprefix('update ')}"
    parts = [check.name.partition(": ")[2] for check in checks]
    return f"{first}: {', '.join(parts)}" if parts[0] != "log-probs" or parts[-1] != "metrics" else first


def _folded(line: str, width: int, start: str = "") -> list[str]:
    """Return the lines of a text after `start`; the others are as far to the right. No word is cut."""
    indents = {"initial_indent": start, "subsequent_indent": " " * len(start)}
    return TextWrapper(width, break_on_hyphens=False, break_long_words=False, **indents).wrap(line)


def as_json(found: Explanation) -> dict[str, Any]:
    """Return the explanation as JSON values."""
    return {
        "a": str(found.a),
        "b": str(found.b),
        "verdict": found.verdict.value,
        "steps": found.steps,
        "rounding": found.rounding,
        "first": found.first and _found(found.first),
        "first_beyond_rounding": found.beyond and _found(found.beyond),
        "shown_step": found.shown,
        "checks": [_check(check) for check in found.checks],
        "settings": [{"name": own.name, "values": [own.a, own.b]} for own in found.settings],
        "notes": found.notes,
    }


def _found(found: Found) -> dict[str, Any]:
    return {"step": found.step, **_check(found.check)}


def _check(check: Check) -> dict[str, Any]:
    return {"check": check.name, "verdict": check.verdict.value, "detail": check.detail, "place": dict(check.place)}


def _finite(value: Any) -> Any:
    """Return JSON values with null for what strict JSON lacks: NaN and infinities."""
    if isinstance(value, dict):
        return {key: _finite(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_finite(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
