"""What a command would print, for the few whose output follows from their words alone: `basename`, `dirname`, `seq`, `echo`.

Change here: a command of that kind. Nothing that looks at files, the machine or the clock belongs here.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Sequence

_LONGEST_SEQUENCE = 10_000


def _basename(words: Sequence[str]) -> str:
    path, *suffix = words
    name = posixpath.basename(path.rstrip("/"))
    return name.removesuffix(suffix[0]) if suffix else name


def _dirname(words: Sequence[str]) -> str:
    return posixpath.dirname(words[0].rstrip("/")) or "."


def _seq(words: Sequence[str]) -> str:
    numbers = [int(word) for word in words]
    first, step, last = {1: (1, 1, *numbers), 2: (numbers[0], 1, numbers[-1]), 3: tuple(numbers)}[len(numbers)]
    listed = range(first, last + (1 if step > 0 else -1), step)
    if len(listed) > _LONGEST_SEQUENCE:
        raise ValueError(len(listed))
    return "\n".join(map(str, listed))


def _echo(words: Sequence[str]) -> str:
    return " ".join(words[1:] if words[:1] == ["-n"] else words)


_PRINTED: dict[str, Callable[[Sequence[str]], str]] = {
    "basename": _basename,
    "dirname": _dirname,
    "realpath": lambda words: posixpath.normpath(words[0]),
    "seq": _seq,
    "echo": _echo,
    "pwd": lambda words: ".",
}


def printed(words: Sequence[str]) -> str | None:
    """Return the output of a command without the end of its last line; None if only a run would tell."""
    name, *rest = words or [""]
    rest = rest[1:] if rest[:1] == ["--"] else rest
    if name not in _PRINTED:
        return None
    try:
        return _PRINTED[name](rest)
    except (ValueError, IndexError, KeyError):
        return None
