"""Words expanded to the fields that a command would get, without running anything.

Change here: an expansion of bash.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable

from dapo_mcore.foreign.bash import arithmetic
from dapo_mcore.foreign.bash.scope import Scope, unset
from dapo_mcore.foreign.bash.values import Value, derived, not_known
from dapo_mcore.foreign.bash.words import ESCAPED_SLASH, Arithmetic, Literal, Output, Parameter, Word

_DEFAULTS = (":-", "-", ":+", "+")
_RANGE = re.compile(r"\{(\d{1,4})\.\.(\d{1,4})\}")


class Expander:
    """Expands words in a scope. `output` returns what a command would print, as far as that is known without running it."""

    def __init__(self, scope: Scope, output: Callable[[str, int], Value]) -> None:
        self.scope = scope
        self._output = output

    def one(self, word: Word) -> Value:
        """Return a word as one text: the right side of an assignment."""
        return derived(lambda *texts: "".join(texts), [self._part(part, word.line) for part in word.parts], word.line)

    def fields(self, word: Word) -> list[Value]:
        """Return the fields of a word: unquoted values are split at blanks, `"${A[@]}"` gives one field an item."""
        if (plain := word.plain) and (match := _RANGE.fullmatch(plain)):
            first, last = int(match[1]), int(match[2])
            step = 1 if last >= first else -1
            return [Value(str(number), word.line) for number in range(first, last + step, step)]
        fields: list[list[Value]] = []
        is_open = False
        for part in word.parts:
            pieces, joins_left, joins_right = self._pieces(part, word.line)
            if pieces and is_open and joins_left:
                fields[-1].append(pieces.pop(0))
                is_open = joins_right
            elif pieces or not joins_right:
                is_open = joins_right
            fields.extend([piece] for piece in pieces)
        return [self._field(field, word.line) for field in fields]

    def _field(self, pieces: list[Value], line: int) -> Value:
        return pieces[0] if len(pieces) == 1 else derived(lambda *texts: "".join(texts), pieces, line)

    def _pieces(self, part: object, line: int) -> tuple[list[Value], bool, bool]:
        """Return the pieces of a part, and whether the first and the last of them join their neighbours."""
        if isinstance(part, Literal) and (part.quoted or not any(char.isspace() for char in part.text)):
            return [Value(part.text, line)], True, True
        if isinstance(part, Parameter) and self._is_list(part):
            items = self._items(part, line)
            if part.quoted:
                return list(items), True, True
            return [piece for item in items for piece in _split(item)], True, True
        value = self._part(part, line)
        if isinstance(part, Parameter) and part.arg and part.op in _DEFAULTS and value == self.one(part.arg).at(line):
            return self.fields(part.arg), True, True
        if part.quoted:
            return [value], True, True
        return _split(value), not value.text[:1].isspace(), not value.text[-1:].isspace()

    def _is_list(self, part: Parameter) -> bool:
        index = part.index.plain if part.index else ""
        if part.op in ("length", ":-", "-", ":+", "+") or part.name == "#":
            return False
        return index == "@" or part.name == "@" or (not part.quoted and (index == "*" or part.name == "*"))

    def _items(self, part: Parameter, line: int) -> list[Value]:
        if part.op == "indirect":
            held = self.scope.variables.get(part.name)
            return [Value(key, line) for key in (held if isinstance(held, dict) else {})]
        items = self.scope.array(part.name, line)
        if items is None:
            return [unset(part.name, line)]
        if part.op == ":" and part.arg:
            return self._slice(items, part, line)
        if part.op:
            return [self._changed(item, part, line) for item in items]
        return items

    def _slice(self, items: list[Value], part: Parameter, line: int) -> list[Value]:
        start, _, count = self.one(part.arg).text.partition(":")
        if not start.strip().isdecimal() or (count and not count.strip().isdecimal()):
            return items
        first = max(int(start) - (part.name in ("@", "*")), 0)
        return items[first : first + int(count) if count else None]

    def _part(self, part: object, line: int) -> Value:
        if isinstance(part, Literal):
            return Value(part.text, line)
        if isinstance(part, Output):
            return self._output(part.source, line)
        if isinstance(part, Arithmetic):
            return self.arithmetic(part.body)
        return self._parameter(part, line)

    def arithmetic(self, body: Word) -> Value:
        """Return the value of `$((…))`, and set the variables that it assigns to."""
        text = self.one(body)
        values: dict[str, Value] = {}
        try:
            if not text.unknown:
                values = self._values(text.text, body.line)
            lacking = tuple(name for value in (text, *values.values()) for name in value.unknown)
            if not lacking:
                return self._computed(text, values)
        except arithmetic.NotSet as error:
            lacking = (error.name,)
        except arithmetic.NotArithmetic:
            lacking = ()
        shown = f"$(({text.text.strip()}))"
        return Value(shown, body.line, tuple(dict.fromkeys(lacking)) or (shown,))

    def _values(self, text: str, line: int) -> dict[str, Value]:
        found = {name: self.scope.value(name, line) for name in arithmetic.names_in(text)}
        return {name: value for name, value in found.items() if value is not None}

    def _computed(self, text: Value, values: dict[str, Value]) -> Value:
        def result(source: str, *texts: str) -> str:
            return str(arithmetic.compute(source, dict(zip(values, texts, strict=True))))

        value = derived(result, [text, *values.values()], text.line)
        after = {name: held.text for name, held in values.items()}
        arithmetic.compute(text.text, after)
        for name, changed in after.items():
            if name not in values or changed != values[name].text:
                self.scope.set(name, Value(changed, text.line, depends=value.depends))
        return value

    def _parameter(self, part: Parameter, line: int) -> Value:
        index = self.one(part.index).text if part.index else ""
        if part.op == "indirect":
            name = self.scope.value(part.name, line)
            return (self.scope.value(name.text, line) if name else None) or unset(f"!{part.name}", line)
        if part.op == "length" and index in ("@", "*"):
            return Value(str(len(self.scope.array(part.name, line) or [])), line)
        value = self.scope.value(part.name, line, index)
        if part.op in (*_DEFAULTS, ":=", "=", ":?", "?"):
            return self._conditional(part, value, line)
        if value is None:
            return unset(part.name, line)
        return self._changed(value, part, line)

    def _conditional(self, part: Parameter, value: Value | None, line: int) -> Value:
        """Return `${name:-word}` and its like, in an empty environment. An empty default says nothing: it stays unknown."""
        is_there = value is not None and (not part.op.startswith(":") or value.text != "")
        if part.op[-1] == "+":
            return self.one(part.arg) if is_there and part.arg else Value("", line)
        if is_there:
            return value
        default = self.one(part.arg) if part.arg and part.op[-1] != "?" else Value("", line)
        if part.op[-1] == "?" or (value is None and not default.text):
            default = unset(part.name, line)
        if part.op[-1] == "=":
            self.scope.set(part.name, default)
        return default.at(line)

    def _changed(self, value: Value, part: Parameter, line: int) -> Value:
        if part.op in ("", "@"):
            return value
        arg = self.one(part.arg) if part.arg else Value("", line)
        if value.unknown or arg.unknown:
            sign = "#" if part.op == "length" else ""
            shown = f"${{{sign}{part.name}{'' if sign else part.op + arg.text}}}"
            return Value(shown, line, tuple(dict.fromkeys((*value.unknown, *arg.unknown))), (), value.depends)
        return derived(lambda text, other: _change(text, part.op, other), [value, arg], line)


def _split(value: Value) -> list[Value]:
    """Return the fields of an unquoted value. One that may be empty or not gives the fields of its other texts too."""
    if value.unknown:
        return [value]
    pieces = value.text.split()
    if len(pieces) == 1 and all(len(other.split()) == 1 for other in value.others):
        return [derived(str.strip, [value], value.line)]
    if not pieces and value.others:
        pieces = [piece for other in value.others for piece in other.split()]
    return [Value(piece, value.line, (), (), value.depends) for piece in pieces]


def _change(text: str, op: str, arg: str) -> str:
    """Return the text changed as `${name op arg}` says; ConfigError never: what is not read leaves the text as it is."""
    if op == "length":
        return str(len(text))
    if op in ("#", "##", "%", "%%"):
        return _cut(text, arg, at_start=op[0] == "#", longest=len(op) == 2)
    if op in ("^", "^^", ",", ",,"):
        change = str.upper if op[0] == "^" else str.lower
        return change(text) if len(op) == 2 else change(text[:1]) + text[1:]
    if op == ":":
        return _substring(text, arg)
    pattern, _, replacement = arg.partition("/")
    pattern = pattern.replace(ESCAPED_SLASH, "/")
    found = re.compile(fnmatch.translate(pattern).removesuffix(r"\Z").removesuffix(r"\z"))
    if op in ("/#", "/%"):
        cut = _cut(text, pattern, at_start=op == "/#", longest=True)
        return text if cut == text else replacement + cut if op == "/#" else cut + replacement
    return found.sub(lambda _: replacement, text, count=1 if op == "/" else 0) if pattern else text


def _cut(text: str, pattern: str, at_start: bool, longest: bool) -> str:
    lengths = range(len(text) + 1)
    for length in reversed(lengths) if longest else lengths:
        piece = text[:length] if at_start else text[len(text) - length :]
        if fnmatch.fnmatchcase(piece, pattern):
            return text[length:] if at_start else text[: len(text) - length]
    return text


def _substring(text: str, arg: str) -> str:
    try:
        start, *count = [arithmetic.compute(part, {}) for part in arg.split(":")]
    except arithmetic.NotArithmetic:
        return text
    start = max(len(text) + start, 0) if start < 0 else start
    if not count:
        return text[start:]
    return text[start : len(text) + count[0] if count[0] < 0 else start + count[0]]


def not_run(source: str, line: int) -> Value:
    """Return what stands for the output of a command that only a run would tell."""
    shown = f"$({' '.join(source.split())})"
    return not_known(shown, shown, line)
