"""The report of an import, worst first: lost, not known, to decide, converted, kept, the source's defaults, meaningless.

Change here: its words and its layout.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from dapo_mcore.config.foreign_names import TITLES
from dapo_mcore.foreign.convert import Conversion
from dapo_mcore.foreign.table import Kind, Outcome
from dapo_mcore.foreign.write import default_of, line_number, shown

_WIDTH = 130
_MOST_NAMED = 16
"""Meaningless settings of one kind that are named: hydra's resolved configuration has hundreds."""
_COLUMN = 62
"""Most letters of a left column: longer ones push the right one to its own line."""


def report(conversion: Conversion, accepted: Sequence[str] = ()) -> str:
    """Return the report as text, one block per fate of a setting, and a first line with their numbers."""
    blocks = [
        _head(conversion),
        _lost(conversion, accepted, objective=True),
        _lost(conversion, accepted, objective=False),
        _asked(conversion),
        _rows(conversion, "converted", "CONVERTED: another name and another value or unit"),
        _rows(conversion, "same", "KEPT: the value stands as it is"),
        _defaults(conversion),
        _meaningless(conversion),
    ]
    return "\n\n".join("\n".join(block) for block in map(list, blocks) if block) + "\n"


def counts(conversion: Conversion) -> dict[str, int]:
    """Return how many settings of the run met each fate: same, converted, meaningless, lost, asked, unknown."""
    kinds = Counter(conversion.kind_of(setting.key) or "unknown" for setting in conversion.run.settings)
    return {kind: kinds[kind] for kind in ("same", "converted", "meaningless", "lost", "asked", "unknown")}


def _head(conversion: Conversion) -> Iterator[str]:
    run, number = conversion.run, counts(conversion)
    words = {"same": "kept", "converted": "converted", "meaningless": "meaningless here", "lost": "lost",
             "asked": "open", "unknown": "not known to the table"}  # fmt: skip
    told = ", ".join(f"{number[kind]} {word}" for kind, word in words.items() if number[kind] or kind == "lost")
    given = {setting.key for setting in run.settings}
    if by_default := sum(name not in given for name in conversion.losses):
        told += f"; {by_default} of its defaults {'is' if by_default == 1 else 'are'} lost"
    asked = len(conversion.asked)
    decide = f"; {asked} {'key is' if asked == 1 else 'keys are'} for you to decide" if asked else ""
    yield f"{run.file.name}: {len(run.settings)} settings of {TITLES[conversion.table.dialect]}: {told}{decide}"
    if not run.complete:
        yield f"What it leaves out has the defaults of {conversion.table.title}."
    for note in run.notes:
        yield from _wrapped(note, "Note: ")
    for setting in run.settings:
        if setting.depends and not setting.others:
            yield from _wrapped(f"{setting.key} holds only if {' and '.join(setting.depends)}", "Note: ")


def _lost(conversion: Conversion, accepted: Sequence[str], objective: bool) -> Iterator[str]:
    named = [name for name, changes in conversion.losses.items() if changes == objective]
    if not named:
        return
    left = [name for name in named if name not in accepted]
    if objective:
        rest = f"accept what you can do without: --accept {' '.join(left)}" if left else "accepted"
        yield f"LOST, AND IT CHANGES WHAT IS OPTIMISED ({len(named)}): {rest}"
    else:
        yield f"LOST ({len(named)})"
    for outcome in conversion.outcomes:
        if outcome.kind == "lost" and outcome.objective == objective:
            yield _source(conversion, outcome)
            yield from _wrapped(outcome.note, "        ")
    for setting in conversion.unknown:
        if conversion.optimises(setting) == objective:
            yield f"{line_number(setting):>4}  {setting.key}={shown(setting.value)}"
            yield "        not known to the table" + (", and it may change what is optimised" if objective else "")


def _asked(conversion: Conversion) -> Iterator[str]:
    asked = conversion.asked
    if not asked:
        return
    yield f"TO DECIDE ({len(asked)}): `???` in the YAML, which no start accepts; answer there or as KEY=VALUE"
    for ours, outcome in asked.items():
        yield f"{_source(conversion, outcome)} → {ours}: ???"
        yield from _wrapped(outcome.note, "        ")


def _rows(conversion: Conversion, kind: Kind, title: str) -> Iterator[str]:
    """Yield the outcomes of a kind that follow from settings of the run itself. Those of evaluation sets beside their files are
    left out: they repeat the training prompts'."""
    rows = [
        (_source(conversion, outcome), f"→ {outcome.ours}" if kind == "same" else _ours(outcome))
        for outcome in conversion.outcomes
        if outcome.kind == kind and outcome.ours and conversion.is_given(outcome) and not _repeats(outcome)
    ]
    if rows:
        yield f"{title} ({counts(conversion)[kind]})"
        yield from _table(dict.fromkeys(rows))


def _repeats(outcome: Outcome) -> bool:
    ours = str(outcome.ours)
    return ours.startswith("eval.sets.") and not ours.endswith(".files")


def _defaults(conversion: Conversion) -> Iterator[str]:
    dialect = TITLES[conversion.table.dialect]
    rows = {
        (f"{'':4}  {outcome.ours}: {shown(outcome.value)}", f"ours: {shown(default_of(str(outcome.ours)))}")
        for outcome in conversion.outcomes
        if outcome.kind in ("same", "converted") and not conversion.is_given(outcome) and not _repeats(outcome)
        and outcome.ours and outcome.value != default_of(outcome.ours)
    }  # fmt: skip
    if rows:
        yield f"DEFAULTS OF {dialect.upper()} that the run relies on, and that are not ours ({len(rows)})"
        yield from _table(sorted(rows))


def _meaningless(conversion: Conversion) -> Iterator[str]:
    """Yield settings that change nothing here, under the titles of their rules, so that ten of a kind take one line."""
    titles = {rule.about: rule.title for rule in conversion.table.rules if rule.title}
    groups: dict[str, list[str]] = {}
    told: set[str] = set()
    for outcome in conversion.outcomes:
        key = outcome.sources[0]
        if outcome.kind == "meaningless" and conversion.kind_of(key) == "meaningless" and key not in told:
            told.add(key)
            title = titles.get(outcome.note)
            groups.setdefault(f"{title}: {outcome.note}" if title else outcome.note, []).append(_short_key(key))
    if not groups:
        return
    yield f"MEANINGLESS HERE ({counts(conversion)['meaningless']})"
    for why, keys in groups.items():
        yield from _wrapped(why, "      ")
        more = f" and {len(keys) - _MOST_NAMED} more" if len(keys) > _MOST_NAMED else ""
        yield from _wrapped(", ".join(keys[:_MOST_NAMED]) + more, "        ")


def _source(conversion: Conversion, outcome: Outcome) -> str:
    """Return the settings that an outcome comes from, after the number of their first line."""
    places = conversion.places(outcome)
    if not places:
        first = outcome.sources[0]
        return f"{'':4}  {first}" + (
            "" if first == conversion.run.entry else f" ({TITLES[conversion.table.dialect]}'s default)"
        )
    named = ", ".join(f"{_short_key(setting.key)}={shown(setting.value)}" for setting in places)
    return f"{line_number(places[0]):>4}  {named}"


def _short_key(key: str) -> str:
    """Return verl's key without the word that half of them begin with."""
    return key.removeprefix("actor_rollout_ref.")


def _ours(outcome: Outcome) -> str:
    told = f" ({outcome.note})" if outcome.note else ""
    return f"→ {outcome.ours}: {shown(outcome.value)}{told}"


def _table(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    rows = list(rows)
    width = max((len(left) for left, _ in rows if len(left) <= _COLUMN), default=0)
    for left, right in rows:
        first, *more = textwrap.wrap(right, max(40, _WIDTH - width - 4), break_long_words=False) or [""]
        if len(left) > width:
            yield left
            left = ""
        yield f"{left:<{width}}  {first}"
        yield from (f"{'':<{width}}    {line}" for line in more)


def _wrapped(text: str, indent: str) -> Iterator[str]:
    yield from textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=" " * len(indent),
        break_long_words=False,
        break_on_hyphens=False,
    )
