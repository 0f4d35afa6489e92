"""What a name of verl, slime or NeMo-RL stands for that somebody has written where our key belongs.

Change here: which spellings are found, and what is said of them. The names are in foreign_names.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from dapo_mcore.config.foreign_names import DIALECTS, TITLES, Name

_NEAR = 0.9
"""Likeness from which on a word counts as a misspelt foreign name."""


class Foreign(NamedTuple):
    """A foreign key that somebody has written where ours belongs."""

    dialect: str
    name: Name

    def __str__(self) -> str:
        """Return `verl's name for rollout.group_size (responses per prompt)`."""
        unit = f" ({self.name.unit})" if self.name.unit else ""
        *others, last = self.name.keys
        ours = f"{', '.join(others)} and {last}" if others else last
        return f"{TITLES[self.dialect]}'s name for {ours}{unit}"


def foreign(key: str) -> Foreign | None:
    """Return what a whole foreign key or flag, or one without its first parts, stands for; None if it is no foreign name or
    several with different meanings. `+actor_rollout_ref.rollout.n`, `rollout.n` and `--rollout-batch-size` are found."""
    found = _found(_plain(key))
    return found[0] if len({entry.name.keys[0] for entry in found}) == 1 else None


def meant_by(name: str) -> list[str]:
    """Return our keys that the last part of a foreign key stands for, in dialects' order: `n` is rollout.group_size."""
    return list(dict.fromkeys(entry.name.keys[0] for entry in ending(name)))


def ending(name: str) -> list[Foreign]:
    """Return the foreign keys whose last part is `name`."""
    return _by_end().get(_plain(name), [])


def misspelt(key: str) -> str:
    """Return the whole foreign name that nearly has a key's letters, with what it stands for; "" if there is none."""
    near = difflib.get_close_matches(_plain(key), [full for full, _ in _entries()], n=1, cutoff=_NEAR)
    if not near or (found := foreign(near[0])) is None:
        return ""
    return f"{f'--{near[0]}'.replace('_', '-') if found.dialect == 'slime' else near[0]}, {found}"


def unknown_arguments(words: Sequence[str]) -> str:
    """Return what to say about words of a command line that are neither options nor overrides."""
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    for option in options:
        if found := foreign(option):
            return f"{option} is {found}; write {found.name.keys[0]}=VALUE"
    hints = [f"; did you mean {near}?" for option in options if (near := misspelt(option))]
    return f"unrecognized arguments: {' '.join(words)}{''.join(hints[:1])}"


def _plain(key: str) -> str:
    return key.lstrip("+-").replace("-", "_")


def _found(key: str) -> list[Foreign]:
    """Return what the key stands for as a whole; else, if it has several parts or is a flag, as the end of longer ones."""
    whole = [entry for full, entry in _entries() if full == key]
    return whole or [entry for full, entry in _entries() if "." in key and full.endswith(f".{key}")]


@cache
def _entries() -> tuple[tuple[str, Foreign], ...]:
    return tuple(
        (_plain(key), Foreign(dialect, name)) for dialect, names in DIALECTS.items() for key, name in names.items()
    )


@cache
def _by_end() -> dict[str, list[Foreign]]:
    ends: dict[str, list[Foreign]] = {}
    for key, entry in _entries():
        ends.setdefault(key.rpartition(".")[2], []).append(entry)
    return ends
