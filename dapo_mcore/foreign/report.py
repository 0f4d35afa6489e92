"""The report of an import, worst first: lost, not known, to decide, converted, kept, the source's defaults, meaningless.

Change here: its words and its layout.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from dapo_mcore.config.foreign_names import TITLES
from dapo_mcore.foreign.convert import Conversion
from dapo_mcore.foreign.settings import ForeignSetting
from dapo_mcore.foreign.table import Outcome
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
        _converted(conversion),
        _kept(conversion),
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
             "asked": "to decide", "unknown": "not known to the table"}  # fmt: skip
    told = ", ".join(f"{number[kind]} {word}" for kind, word in words.items() if number[kind] or kind == "lost")
    program = "; its program is lost" if run.entry in conversion.losses else ""
    yield f"{run.file.name}: {len(run.settings)} settings of {TITLES[conversion.table.dialect]}: {told}{program}"
    if not run.complete:
        configuration = f", {run.config}" if run.config and "config-name" not in run.by_key() else ""
        yield f"What it leaves out has the defaults of {conversion.table.title}{configuration}{_fates_of_defaults(conversion)}."
    for note in run.notes:
        yield from _wrapped(note, "Note: ")
    for setting in run.settings:
        if setting.depends and not setting.others:
            yield from _wrapped(f"{setting.key} holds only if {' and '.join(setting.depends)}", "Note: ")


def _fates_of_defaults(conversion: Conversion) -> str:
    """Return what happened to settings that the run leaves out: they are in the blocks below, but not in the first line's numbers."""
    given = {setting.key for setting in conversion.run.settings}
    lost = sum(name not in given and name != conversion.run.entry for name in conversion.losses)
    asked = sum(not conversion.is_given(outcome) for outcome in conversion.asked.values())
    told = [f"{number} {word}" for number, word in ((lost, "lost"), (asked, "to decide")) if number]
    return f": {' and '.join(told)}" if told else ""


def _lost(conversion: Conversion, accepted: Sequence[str], objective: bool) -> Iterator[str]:
    named = [name for name, changes in conversion.losses.items() if changes == objective]
    if not named:
        return
    left = [name for name in named if name not in accepted]
    if objective:
        rest = f"accept what you can do without: --accept {' '.join(left)}" if left else "accepted"
        yield f"LOST, AND IT CHANGES WHAT IS OPTIMISED: {rest}"
    else:
        yield "LOST"
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
    yield f"TO DECIDE ({len(asked)} {'keys' if len(asked) > 1 else 'key'}): `???` in the YAML, which no start accepts; answer there or as KEY=VALUE"
    for ours, outcome in asked.items():
        yield from _wrapped(f"{_source(conversion, outcome)} → {ours}: ???", "", " " * 8)
        yield from _wrapped(outcome.note, "        ")


def _converted(conversion: Conversion) -> Iterator[str]:
    """Yield what the settings became that are not just kept, with all that follows from the same settings in one row. Keys of
    evaluation sets are left out where they repeat what other rows say, such as the training prompts'."""
    rows: dict[str, list[Outcome]] = {}
    for outcome in conversion.outcomes:
        told = outcome.kind in ("same", "converted") and outcome.ours and conversion.is_given(outcome)
        if told and not _repeats(conversion, outcome) and not _only_kept(conversion, outcome):
            rows.setdefault(_source(conversion, outcome), []).append(outcome)
    if rows:
        yield "CONVERTED: another name and another value or unit"
        yield from _table(
            (source, f"→ {_became(outcomes)}{_beside_a_loss(conversion, outcomes)}")
            for source, outcomes in rows.items()
        )


def _beside_a_loss(conversion: Conversion, outcomes: Sequence[Outcome]) -> str:
    keys = {setting.key for outcome in outcomes for setting in conversion.places(outcome)}
    return "; LOST says what this leaves out" if any(conversion.kind_of(key) == "lost" for key in keys) else ""


def _kept(conversion: Conversion) -> Iterator[str]:
    settings = [setting for setting in conversion.run.settings if conversion.kind_of(setting.key) == "same"]
    if not settings:
        return
    ours: dict[str, str] = {}
    for outcome in conversion.outcomes:
        for key in outcome.sources if outcome.kind == "same" else ():
            ours.setdefault(key, str(outcome.ours))
    yield f"KEPT: the value stands as it is ({len(settings)})"
    yield from _columns(f"{_setting(setting)} → {ours[setting.key]}" for setting in settings)


def _only_kept(conversion: Conversion, outcome: Outcome) -> bool:
    places = conversion.places(outcome)
    return bool(places) and all(conversion.kind_of(setting.key) == "same" for setting in places)


def _repeats(conversion: Conversion, outcome: Outcome) -> bool:
    """Return True for a key of an evaluation set whose settings are told by other keys, too."""
    told = {key for other in conversion.outcomes if other.ours and not _is_of_a_set(other) for key in other.sources}
    return _is_of_a_set(outcome) and told.issuperset(outcome.sources)


def _is_of_a_set(outcome: Outcome) -> bool:
    """Return True for a key of an evaluation set, but for its files."""
    ours = str(outcome.ours)
    return ours.startswith("eval.sets.") and not ours.endswith(".files")


def _defaults(conversion: Conversion) -> Iterator[str]:
    dialect = TITLES[conversion.table.dialect]
    rows = {
        f"{'':4}  {outcome.ours}: {shown(outcome.value)} (ours {shown(default_of(str(outcome.ours)))})"
        for outcome in conversion.outcomes
        if outcome.kind in ("same", "converted") and not conversion.is_given(outcome) and not _repeats(conversion, outcome)
        and outcome.ours and outcome.value != default_of(outcome.ours)
    }  # fmt: skip
    if rows:
        yield f"DEFAULTS OF {dialect.upper()} that the run relies on, and that are not ours ({len(rows)})"
        yield from _columns(sorted(rows))


def _meaningless(conversion: Conversion) -> Iterator[str]:
    """Yield settings that change nothing here, under the titles of their rules, so that ten of a kind take one line."""
    titles = {rule.about: rule.title for rule in conversion.table.rules if rule.title}
    groups: dict[str, list[str]] = {}
    told: set[str] = set()
    for outcome in conversion.outcomes:
        key = outcome.sources[0] if outcome.kind == "meaningless" else ""
        if key and conversion.kind_of(key) == "meaningless" and key not in told:
            told.add(key)
            title = titles.get(outcome.note)
            groups.setdefault(f"{title}: {outcome.note}" if title else outcome.note, []).append(_short_key(key))
    if not groups:
        return
    yield f"MEANINGLESS HERE ({counts(conversion)['meaningless']})"
    for why, keys in groups.items():
        more = f" and {len(keys) - _MOST_NAMED} more" if len(keys) > _MOST_NAMED else ""
        yield from _wrapped(f"{', '.join(keys[:_MOST_NAMED])}{more}: {why}", "      ", "  ")


def _source(conversion: Conversion, outcome: Outcome) -> str:
    """Return the settings that an outcome comes from, after the number of their first line."""
    places = conversion.places(outcome)
    if not places:
        first, dialect = outcome.sources[0], TITLES[conversion.table.dialect]
        return f"{'':4}  {first}" + ("" if first == conversion.run.entry else f" ({dialect}'s default)")
    named = ", ".join(f"{_short_key(setting.key)}={shown(setting.value)}" for setting in places)
    return f"{line_number(places[0]):>4}  {named}"


def _setting(setting: ForeignSetting) -> str:
    return f"{line_number(setting):>4}  {_short_key(setting.key)}={shown(setting.value)}"


def _short_key(key: str) -> str:
    """Return verl's key without the word that half of them begin with."""
    return key.removeprefix("actor_rollout_ref.")


def _became(outcomes: Sequence[Outcome]) -> str:
    """Return our keys that follow from the same settings, with a note that several in a row share only after the last."""
    notes = [outcome.note if outcome.kind == "converted" else "" for outcome in outcomes]
    told = [f" ({note})" if note and note != after else "" for note, after in zip(notes, [*notes[1:], ""])]
    return ", ".join(f"{_ours(outcome)}{note}" for outcome, note in zip(outcomes, told))


def _ours(outcome: Outcome) -> str:
    return f"{outcome.ours}: {shown(outcome.value)}" if outcome.kind == "converted" else str(outcome.ours)


def _table(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    rows = list(rows)
    width = max((len(left) for left, _ in rows if len(left) <= _COLUMN), default=0)
    for left, right in rows:
        first, *more = textwrap.wrap(right, max(40, _WIDTH - width - 4), break_long_words=False) or [""]
        if len(left) > width:
            yield from _wrapped(left, "", " " * 8)
            left = ""
        yield f"{left:<{width}}  {first}"
        yield from (f"{'':<{width}}    {line}" for line in more)


def _columns(cells: Iterable[str]) -> Iterator[str]:
    """Yield short cells two to a line. A long one stands alone."""
    left = ""
    for cell in cells:
        if left and max(len(left), len(cell)) < _WIDTH // 2:
            yield f"{left:<{_WIDTH // 2}}{cell}"
            left = ""
            continue
        if left:
            yield left
        left = cell
    if left:
        yield left


def _wrapped(text: str, indent: str, hanging: str = "") -> Iterator[str]:
    yield from textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=" " * len(indent) + hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )
