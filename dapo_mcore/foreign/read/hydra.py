"""Hydra's overrides: `a.b=c`, `+a.b=c`, `++a.b=c`, `~a.b`, with values as hydra parses them.

Change here: the grammar of values. Source: hydra 1.3, OverrideParser.g4.
"""

from __future__ import annotations

import re
from typing import Any

_OVERRIDE = re.compile(r"(\+\+|\+|~)?([A-Za-z_$@][\w.@/$:{}\[\]-]*)(?:=(.*))?\Z", re.DOTALL)
_INTEGER = re.compile(r"[+-]?(0|[1-9][0-9]*(_[0-9]+)*)\Z")
_FLOAT = re.compile(
    r"[+-]?((\d[\d_]*)?\.\d[\d_]*|\d[\d_]*\.|(?=.*[eE])\d[\d_]*)([eE][+-]?\d+)?\Z|[+-]?(inf|nan)\Z", re.IGNORECASE
)
_WORDS = {"true": True, "false": False, "null": None}
_CLOSING = {"[": "]", "{": "}", "(": ")"}


def override(text: str) -> tuple[str, Any, bool] | None:
    """Return (key, value, removed) of an override; None for a word that is none.

    `+a.b=1` gives ("a.b", 1, False), `~a.b` gives ("a.b", None, True).
    """
    match = _OVERRIDE.match(text)
    if not match or (match[1] != "~" and match[3] is None):
        return None
    if match[1] == "~":
        return match[2], None, True
    return match[2], value(match[3]), False


def value(text: str) -> Any:
    """Return a value as hydra parses it: numbers, true and false, null, quoted text, [a, b], {a: 1}; else the text.

    A text whose brackets or quotes do not match stays text: hydra would refuse it, and the report shows it.
    """
    try:
        parser = _Parser(text)
        found = parser.element("")
        return found if parser.at == len(text) else text.strip()
    except _NoValue:
        return text.strip()


class _NoValue(Exception):
    pass


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def element(self, stop: str) -> Any:
        """Return the value here and go past it and the blanks around it. `stop`: the characters that end a plain text."""
        self._blanks()
        char = self.text[self.at : self.at + 1]
        if char in ("'", '"'):
            found = self._quoted(char)
        elif char == "[":
            found = self._list()
        elif char == "{":
            found = self._dict()
        else:
            return self._plain(stop)
        self._blanks()
        return found

    def _blanks(self) -> None:
        while self.text[self.at : self.at + 1].isspace():
            self.at += 1

    def _quoted(self, quote: str) -> str:
        end = self.at + 1
        while self.text[end : end + 1] != quote:
            if end >= len(self.text):
                raise _NoValue
            end += 2 if self.text[end] == "\\" else 1
        inside = self.text[self.at + 1 : end]
        self.at = end + 1
        return inside.replace("\\" + quote, quote)

    def _list(self) -> list[Any]:
        items: list[Any] = []
        self.at += 1
        self._blanks()
        while self.text[self.at : self.at + 1] != "]":
            items.append(self.element(",]"))
            self._comma("]")
        self.at += 1
        return items

    def _dict(self) -> dict[Any, Any]:
        items: dict[Any, Any] = {}
        self.at += 1
        self._blanks()
        while self.text[self.at : self.at + 1] != "}":
            key = self.element(":")
            if self.text[self.at : self.at + 1] != ":" or isinstance(key, list | dict):
                raise _NoValue
            self.at += 1
            items[key] = self.element(",}")
            self._comma("}")
        self.at += 1
        return items

    def _comma(self, closing: str) -> None:
        char = self.text[self.at : self.at + 1]
        if char == ",":
            self.at += 1
            self._blanks()
        elif char != closing:
            raise _NoValue

    def _plain(self, stop: str) -> Any:
        start, open_brackets = self.at, []
        while self.at < len(self.text):
            char = self.text[self.at]
            if not open_brackets and char in stop:
                break
            if char in _CLOSING:
                open_brackets.append(_CLOSING[char])
            elif open_brackets and char == open_brackets[-1]:
                open_brackets.pop()
            self.at += 1
        return plain(self.text[start : self.at].strip())


def plain(text: str) -> Any:
    """Return the number, bool or None that a text without quotes means; else the text."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INTEGER.match(text):
        return int(text)
    if _FLOAT.match(text):
        return float(text)
    return re.sub(r"\\([\\()\[\]{}:=, \t])", r"\1", text)
