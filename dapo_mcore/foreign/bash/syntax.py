"""Commands of bash as trees: simple commands, lists, branches, loops, functions.

Change here: what is kept of a command. commands.py reads them, follow.py follows them.
"""

from __future__ import annotations

from dataclasses import dataclass

from dapo_mcore.foreign.bash.words import Word


@dataclass(frozen=True, slots=True)
class Assignment:
    """`name=value`, `name+=value`, `name[index]=value`, `name=(a b [key]=c)`: then `value` holds (key or None, word) pairs."""

    name: str
    index: Word | None
    append: bool
    value: Word | tuple[tuple[Word | None, Word], ...]
    line: int


@dataclass(frozen=True, slots=True)
class Simple:
    assignments: tuple[Assignment, ...]
    words: tuple[Word | Assignment, ...]
    line: int


@dataclass(frozen=True, slots=True)
class Expression:
    """`((…))` as a command."""

    body: Word
    line: int


@dataclass(frozen=True, slots=True)
class Listed:
    """Commands with what joins each to the one before: "", `&&`, `||` or `|`, and whether `!` negates it."""

    steps: tuple[tuple[str, bool, Command], ...]


@dataclass(frozen=True, slots=True)
class If:
    """arms: (condition, body) pairs; the condition of `else` is None. text: the line with the condition, for people."""

    arms: tuple[tuple[tuple[Listed, ...] | None, tuple[Listed, ...]], ...]
    line: int
    text: str


@dataclass(frozen=True, slots=True)
class For:
    """`for name in words`; words None for the arguments."""

    name: str
    words: tuple[Word, ...] | None
    body: tuple[Listed, ...]
    line: int
    text: str


@dataclass(frozen=True, slots=True)
class CountingFor:
    """`for ((start; condition; step))`."""

    start: Word
    condition: Word
    step: Word
    body: tuple[Listed, ...]
    line: int
    text: str


@dataclass(frozen=True, slots=True)
class While:
    """`while` or, with `until`, its opposite."""

    condition: tuple[Listed, ...]
    body: tuple[Listed, ...]
    until: bool
    line: int
    text: str


@dataclass(frozen=True, slots=True)
class Case:
    word: Word
    arms: tuple[tuple[tuple[Word, ...], tuple[Listed, ...]], ...]
    line: int
    text: str


@dataclass(frozen=True, slots=True)
class Function:
    name: str
    body: Command


@dataclass(frozen=True, slots=True)
class Group:
    """`{ …; }`, or with `subshell` `( … )`."""

    body: tuple[Listed, ...]
    subshell: bool


Command = Simple | Expression | If | For | CountingFor | While | Case | Function | Group
