"""Texts of which a static reader may not know everything: what they lack, which else they may be, and under which condition.

Change here: how doubt about a part becomes doubt about the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

_MOST_OTHERS = 16


@dataclass(frozen=True, slots=True)
class Value:
    """A text with its line.

    unknown: what is not in the script; the text holds `${NAME}` or `$(command)` in its place.
    others: what the text is on other paths through the script.
    depends: the conditions that choose the path.
    """

    text: str
    line: int = 0
    unknown: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    depends: tuple[str, ...] = ()

    @property
    def is_certain(self) -> bool:
        return not self.unknown and not self.depends

    def at(self, line: int) -> Value:
        return replace(self, line=line)

    def under(self, condition: str) -> Value:
        """Return the value as one that depends on a further condition."""
        return self if condition in self.depends else replace(self, depends=(*self.depends, condition))


def not_known(name: str, text: str, line: int) -> Value:
    return Value(text, line, (name,))


def derived(compute: Callable[..., str], inputs: Sequence[Value], line: int) -> Value:
    """Return compute(*texts), with every doubt about an input. Where the inputs may be other texts, so may the result:
    each is exchanged by itself."""
    texts = [value.text for value in inputs]
    text = compute(*texts)
    others = {
        compute(*texts[:place], other, *texts[place + 1 :]): None
        for place, value in enumerate(inputs)
        for other in value.others
    }
    others.pop(text, None)
    return Value(
        text,
        line,
        _union(value.unknown for value in inputs),
        tuple(others)[:_MOST_OTHERS],
        _union(value.depends for value in inputs),
    )


def either(values: Sequence[Value | None], condition: str) -> Value | None:
    """Return what a variable is after paths that leave it with these values (None: not set)."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    first = there[0]
    if len(there) == len(values) and all(value == first for value in there):
        return first
    texts = dict.fromkeys(text for value in there for text in (value.text, *value.others))
    texts.pop(first.text)
    return Value(
        first.text,
        first.line,
        _union(value.unknown for value in there),
        tuple(texts)[:_MOST_OTHERS],
        _union([*(value.depends for value in there), (condition,)]),
    )


def _union(groups: object) -> tuple[str, ...]:
    return tuple(dict.fromkeys(item for group in groups for item in group))
