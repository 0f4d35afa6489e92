"""The types of a table of rules: what each setting of a foreign run becomes here. One table per dialect is in tables/.

Change here: what a rule may say, and the short forms in which tables write rules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from dapo_mcore.config.foreign_names import Name
from dapo_mcore.foreign.settings import ForeignRun, ForeignSetting

Kind = Literal["same", "converted", "meaningless", "lost", "asked"]
KINDS: tuple[Kind, ...] = ("lost", "asked", "converted", "same", "meaningless")
"""Worst first: a setting that several rules read counts for the first of these."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one setting, or of several that belong together.

    kind: same: the value stands here as it was. converted: another name's value, unit or form. meaningless: it changes nothing
        here. lost: it cannot be had here. asked: a person must decide our key; the YAML holds `???` until then.
    sources: the source's keys that it comes from, the one that names it first; empty for what the source always does.
    ours, value: our dotted key and its value; ours is None for meaningless and lost ones. `value` of an asked one is unused.
    note: how it was converted, why it means nothing, what is lost and the nearest thing here, or what to decide by.
    objective: a lost one that changes what is optimised: the import ends with status 3 unless it is accepted by name.

    Example: Outcome("converted", ("trainer.test_freq",), "eval.every", 1000000000, "-1: never")
    """

    kind: Kind
    sources: tuple[str, ...]
    ours: str | None = None
    value: Any = None
    note: str = ""
    objective: bool = False


class Undecided(Exception):
    """A rule has asked for a setting whose value the file alone does not say. The argument is its key."""


class Source:
    """The settings of a foreign run on top of the source's defaults, as rules read them."""

    def __init__(self, run: ForeignRun, defaults: Mapping[str, Any]):
        self.run = run
        self.defaults = {} if run.complete else defaults
        self.read: set[str] = set()
        """The keys whose values have been read."""
        self._given = run.by_key()

    def __getitem__(self, key: str) -> Any:
        """Return the value of a key: the run's, else the source's default, else None. Raise Undecided if the file alone does not
        say it."""
        self.read.add(key)
        setting = self._given.get(key)
        if setting is None or setting.removed:
            return self.defaults.get(key)
        if not self.is_known(key):
            raise Undecided(key)
        return setting.value

    def path(self, key: str) -> Any:
        """Return a path or a list of paths, in which `${NAME}` of the environment may stand: our paths take it, too."""
        setting = self._given.get(key)
        return setting.value if setting is not None and self.plain_path(key) else self[key]

    def plain_path(self, key: str) -> bool:
        """Return True if the run sets the key, and its value lacks at most variables of the environment, which a path may keep."""
        setting = self._given.get(key)
        return (
            setting is not None
            and not (setting.removed or setting.others)
            and all(name.isidentifier() for name in setting.unknown)
        )

    def is_known(self, key: str) -> bool:
        """Return True if the value of a key can be read: a rule need not ask for more of ours than hangs on it."""
        setting = self._given.get(key)
        return setting is None or setting.removed or not (setting.unknown or setting.others)

    def first(self, *keys: str) -> str:
        """Return the first of several names of one setting that the run gives; the first name if it gives none."""
        return next((key for key in keys if self.gives(key)), keys[0])

    def gives(self, key: str) -> bool:
        """Return True if the run itself sets the key: its value is not the source's default."""
        return key in self._given and not self._given[key].removed

    def setting(self, key: str) -> ForeignSetting | None:
        """Return the setting of the run; None if it does not set the key."""
        return self._given.get(key)

    def below(self, prefix: str) -> dict[str, Any]:
        """Return {rest of the key: value} of the settings that the run gives below a dotted prefix."""
        return {
            key.removeprefix(f"{prefix}."): setting.value
            for key, setting in self._given.items()
            if key.startswith(f"{prefix}.") and not setting.removed
        }

    def below_flag(self, prefix: str) -> list[str]:
        """Return the keys that the run gives and that begin with a prefix."""
        return [key for key in self._given if key.startswith(prefix) and self.gives(key)]


@dataclass(frozen=True, slots=True)
class Rule:
    """What settings of the source become here.

    keys: the source's keys that the rule reads, with `*` for any letters; a setting belongs to each rule that has its key.
    ours: our keys that it may set.
    apply: returns the outcomes for a run. It is called also if the run gives none of the keys, for the source's defaults.
    about: the conversion or the trap, in words, for the page of the table.
    title: what the outcomes of several meaningless keys are called together in the report; "" for a rule of single keys.
    objective: True for lost settings that change what is optimised.
    """

    keys: tuple[str, ...]
    ours: tuple[str, ...]
    apply: Callable[[Source], Iterable[Outcome]]
    about: str = ""
    title: str = ""
    objective: bool = False

    def reads(self, key: str) -> bool:
        """Return True if one of the rule's keys or patterns is this key."""
        return any(key == own or ("*" in own and fnmatchcase(key, own)) for own in self.keys)


@dataclass(frozen=True, slots=True)
class Table:
    """All rules of a dialect.

    dialect: `verl`; title: `verl b178a3c (2026-01-29)`, the version whose defaults hold.
    defaults: returns the source's defaults for a run: they depend on its entry point and configuration.
    rules: in the order of our configuration.
    optimises: beginnings of keys below which a setting that no rule reads may change what is optimised.
    """

    dialect: str
    title: str
    defaults: Callable[[ForeignRun], Mapping[str, Any]]
    rules: tuple[Rule, ...]
    optimises: tuple[str, ...] = ()


def same(names: Mapping[str, Name], *keys: str) -> Rule:
    """Return the rule of a setting whose value stands here as it is. `keys` are its names, the newest first."""
    return changed(names, lambda value: value, *keys)


def changed(names: Mapping[str, Name], change: Callable[[Any], Any], *keys: str) -> Rule:
    """Return the rule of a setting whose value `change` converts. A value of None without a default here is left out."""
    name = names[keys[0]]

    def apply(source: Source) -> Iterator[Outcome]:
        key = source.first(*keys)
        value = source[key]
        if value is None:
            return
        new = change(value)
        kind: Kind = "same" if _equal(new, value) else "converted"
        yield Outcome(kind, (key,), name.ours, new, name.unit if kind == "converted" else "")

    return Rule(keys, (name.ours,), apply, name.unit)


def became(source: Source, ours: str, value: Any, *keys: str, note: str = "") -> Outcome:
    """Return the outcome of settings that our key follows from: the same if it is the value of the first of them."""
    kind: Kind = "same" if not note and _equal(source.path(keys[0]), value) else "converted"
    return Outcome(kind, keys, ours, value, note)


def own_way(ours: str, value: Any, note: str) -> Outcome:
    """Return the outcome of what the source does whatever is set: no setting of the run is behind it."""
    return Outcome("converted", (), ours, value, note)


def asked(ours: str, note: str, *keys: str) -> Outcome:
    """Return the outcome of our key that a person must decide; `note` says by what."""
    return Outcome("asked", keys, ours, note=note)


def gone(note: str, *keys: str, objective: bool = False) -> Outcome:
    """Return the outcome of settings that are lost; `note` says what that costs and names the nearest thing here."""
    return Outcome("lost", keys, note=note, objective=objective)


def combined(apply: Callable[[Source], Iterable[Outcome]], ours: str, *keys: str, about: str = "") -> Rule:
    """Return a rule over several settings that only together say what holds here. `ours` has our keys, joined by `, `."""
    return Rule(keys, tuple(ours.split(", ")), apply, about)


def run_name(key: str) -> Rule:
    """Return the rule of the run's name, which has letters of a folder's name here."""

    def apply(source: Source) -> Iterator[Outcome]:
        if source[key] is None:
            return
        text = str(source[key])
        clean = re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip("-._")[:128] or "run"
        yield became(source, "name", clean, key, note="" if clean == text else "letters that a folder's name may have")

    return Rule((key,), ("name",), apply)


def joined(ours: str, note: str, *keys: str) -> Rule:
    """Return the rule of settings whose lists stand in one list here."""

    def apply(source: Source) -> Iterator[Outcome]:
        if given := tuple(key for key in keys if source[key]):
            yield Outcome("converted", given, ours, [item for key in given for item in source[key]], note)

    return Rule(keys, (ours,), apply, note)


def meaningless(title: str, why: str, *keys: str) -> Rule:
    """Return the rule of settings that change nothing here, under one title in the report."""

    def apply(source: Source) -> Iterator[Outcome]:
        rule = Rule(keys, (), lambda _: ())
        for setting in source.run.settings:
            if rule.reads(setting.key):
                yield Outcome("meaningless", (setting.key,), note=why)

    return Rule(keys, (), apply, why, title)


def lost(what: str, *keys: str, off: tuple[Any, ...] = (None, False), objective: bool = False) -> Rule:
    """Return the rule of a setting that cannot be had here, unless its value is one of `off`. `what` says what the user loses
    and the nearest thing here."""

    def apply(source: Source) -> Iterator[Outcome]:
        rule = Rule(keys, (), lambda _: ())
        named = {setting.key: None for setting in source.run.settings if rule.reads(setting.key)}
        for key in {**named, **{key: None for key in keys if "*" not in key}}:
            if not source.is_known(key):
                note = f"{what}. The script alone does not say whether it is on: accept the loss if it is off"
                yield Outcome("lost", (key,), note=note, objective=objective)
            elif not any(_equal(source[key], value) for value in off):
                yield Outcome("lost", (key,), note=what, objective=objective)
            elif source.gives(key):
                yield Outcome("meaningless", (key,), note="off, as here")

    return Rule(keys, (), apply, what, objective=objective)


def _equal(a: Any, b: Any) -> bool:
    """Return True for equal values of one kind: 1 and 1.0 are equal, 1 and True are not."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)
