"""Conditions of bash (`[ … ]`, `[[ … ]]`, `test`) in three values: True, False, and None where only a run would tell.

Change here: a test of bash.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

from dapo_mcore.foreign.bash.values import Value

_NUMBERS = {"-eq": "==", "-ne": "!=", "-lt": "<", "-le": "<=", "-gt": ">", "-ge": ">="}
_FILE_TESTS = frozenset(f"-{letter}" for letter in "abcdefghkoprstuwxGLNOSv")


def holds(words: Sequence[Value]) -> bool | None:
    """Return whether the words between the brackets hold. A variable of the environment counts as not set: the script is
    read as if run without any. Files are not looked at: None."""
    try:
        test = _Test(words)
        result = test.any_of()
    except (IndexError, ValueError, re.error):
        return None
    return result if test.at == len(words) else None


def both(a: bool | None, b: bool | None) -> bool | None:
    return False if a is False or b is False else None if a is None or b is None else True


def opposite(a: bool | None) -> bool | None:
    return None if a is None else not a


def text_in_empty_environment(value: Value) -> str | None:
    """Return the text with variables of the environment as empty; None if a command's output or a condition decides it."""
    if value.depends or any(name.startswith("$") or "process" in name for name in value.unknown):
        return None
    return re.sub(r"\$\{[^}]*\}", "", value.text) if value.unknown else value.text


class _Test:
    def __init__(self, words: Sequence[Value]) -> None:
        self.words = words
        self.at = 0

    def _next(self) -> str:
        return self.words[self.at].text if self.at < len(self.words) else ""

    def any_of(self) -> bool | None:
        result = self._all_of()
        while self._next() in ("||", "-o"):
            self.at += 1
            result = opposite(both(opposite(result), opposite(self._all_of())))
        return result

    def _all_of(self) -> bool | None:
        result = self._one()
        while self._next() in ("&&", "-a"):
            self.at += 1
            result = both(result, self._one())
        return result

    def _one(self) -> bool | None:
        if len(self.words) - self.at >= 3 and self._is_operator(self.words[self.at + 1].text):
            left, operator, right = self.words[self.at : self.at + 3]
            self.at += 3
            return _compared(left, operator.text, right)
        sign = self._next()
        if sign == "!":
            self.at += 1
            return opposite(self._one())
        if sign == "(":
            self.at += 1
            result = self.any_of()
            self.at += 1
            return result
        if sign in ("-z", "-n"):
            text = text_in_empty_environment(self.words[self.at + 1])
            self.at += 2
            return None if text is None else (text == "") == (sign == "-z")
        if sign in _FILE_TESTS:
            self.at += 2
            return None
        text = text_in_empty_environment(self.words[self.at])
        self.at += 1
        return None if text is None else text != ""

    def _is_operator(self, text: str) -> bool:
        return text in ("=", "==", "!=", "=~", "<", ">", *_NUMBERS) or text in ("-nt", "-ot", "-ef")


def _compared(left: Value, operator: str, right: Value) -> bool | None:
    a, b = text_in_empty_environment(left), text_in_empty_environment(right)
    if a is None or b is None or operator in ("-nt", "-ot", "-ef"):
        return None
    if operator in _NUMBERS:
        sign = _NUMBERS[operator]
        x, y = int(a or "0"), int(b or "0")
        return {"==": x == y, "!=": x != y, "<": x < y, "<=": x <= y, ">": x > y, ">=": x >= y}[sign]
    if operator == "=~":
        return re.search(b, a) is not None
    if operator in ("<", ">"):
        return a < b if operator == "<" else a > b
    return fnmatch.fnmatchcase(a, b) == (operator != "!=")
