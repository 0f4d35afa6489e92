"""Whole-number expressions of bash, computed from the values of variables that are given.

Change here: an operator. Source: the bash reference manual, Shell Arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_TOKEN = re.compile(
    r"\s*(?:(\d+#\w+|0[xX][0-9a-fA-F]+|\d+)|([A-Za-z_]\w*)|(\*\*|\+\+|--|<<=|>>=|<<|>>|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|[-+*/%<>&|^~!?:=(),]))"
)
_BINARY: dict[str, tuple[int, Callable[[int, int], int]]] = {
    "||": (1, lambda a, b: int(bool(a or b))),
    "&&": (2, lambda a, b: int(bool(a and b))),
    "|": (3, lambda a, b: a | b),
    "^": (4, lambda a, b: a ^ b),
    "&": (5, lambda a, b: a & b),
    "==": (6, lambda a, b: int(a == b)),
    "!=": (6, lambda a, b: int(a != b)),
    "<": (7, lambda a, b: int(a < b)),
    ">": (7, lambda a, b: int(a > b)),
    "<=": (7, lambda a, b: int(a <= b)),
    ">=": (7, lambda a, b: int(a >= b)),
    "<<": (8, lambda a, b: a << _small(b)),
    ">>": (8, lambda a, b: a >> _small(b)),
    "+": (9, lambda a, b: a + b),
    "-": (9, lambda a, b: a - b),
    "*": (10, lambda a, b: a * b),
    "/": (10, lambda a, b: _quotient(a, b)),
    "%": (10, lambda a, b: a - b * _quotient(a, b)),
    "**": (11, lambda a, b: a ** _small(b)),
}
_MOST_DIGITS = 64
_DEEPEST = 50


class NotArithmetic(Exception):
    """The text is no whole-number expression, or bash would refuse it."""


class NotSet(NotArithmetic):
    """The expression reads a variable whose value is not given."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def compute(text: str, values: dict[str, str]) -> int:
    """Return the value of an expression; assignments in it (`i++`, `i += 2`) change `values`.

    Division truncates toward zero. An empty variable counts as 0, as in bash.
    Raises NotSet for a variable that is not in `values`, NotArithmetic for what bash would refuse.
    """
    return _Parser(text, values, 0).whole()


class _Parser:
    def __init__(self, text: str, values: dict[str, str], depth: int) -> None:
        if depth > _DEEPEST:
            raise NotArithmetic("variables that name one another")
        self._values, self._depth, self._at = values, depth, 0
        self._tokens = _tokens(text)

    def whole(self) -> int:
        result = self._comma() if self._tokens else 0
        if self._at < len(self._tokens):
            raise NotArithmetic(self._tokens[self._at])
        return result

    def _next(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self) -> str:
        token = self._next()
        self._at += 1
        return token

    def _expect(self, token: str) -> None:
        if self._take() != token:
            raise NotArithmetic(f"no {token}")

    def _comma(self) -> int:
        result = self._choice()
        while self._next() == ",":
            self._take()
            result = self._choice()
        return result

    def _choice(self) -> int:
        following = self._tokens[self._at + 1] if self._at + 1 < len(self._tokens) else ""
        if _is_name(self._next()) and following.endswith("=") and following not in _BINARY:
            return self._assigned(self._take(), self._take())
        condition = self._binary(1)
        if self._next() != "?":
            return condition
        self._take()
        first = self._choice()
        self._expect(":")
        second = self._choice()
        return first if condition else second

    def _assigned(self, name: str, sign: str) -> int:
        value = self._choice()
        if sign != "=":
            value = _BINARY[sign[:-1]][1](self._value(name), value)
        self._values[name] = str(value)
        return value

    def _binary(self, lowest: int) -> int:
        left = self._unary()
        while self._next() in _BINARY and _BINARY[self._next()][0] >= lowest:
            level, operation = _BINARY[self._take()]
            right = self._binary(level if operation is _BINARY["**"][1] else level + 1)
            left = operation(left, right)
            if len(str(left)) > _MOST_DIGITS:
                raise NotArithmetic("a number of so many digits")
        return left

    def _unary(self) -> int:
        token = self._take()
        if token in ("++", "--"):
            name = self._take()
            if not _is_name(name):
                self._at -= 1
                return self._unary()
            self._values[name] = str(self._value(name) + (1 if token == "++" else -1))
            return self._value(name)
        signs = {"-": lambda a: -a, "+": lambda a: a, "!": lambda a: int(not a), "~": lambda a: ~a}
        if token in signs:
            return signs[token](self._unary())
        if token == "(":
            value = self._comma()
            self._expect(")")
            return value
        if _is_name(token):
            return self._named(token)
        return _number(token)

    def _named(self, name: str) -> int:
        value = self._value(name)
        if self._next() in ("++", "--"):
            self._values[name] = str(value + (1 if self._take() == "++" else -1))
        return value

    def _value(self, name: str) -> int:
        if name not in self._values:
            raise NotSet(name)
        text = self._values[name].strip()
        return _Parser(text, self._values, self._depth + 1).whole() if text else 0


def names_in(text: str) -> list[str]:
    """Return the variables that an expression names, each once. Raises NotArithmetic."""
    return list(dict.fromkeys(token for token in _tokens(text) if _is_name(token)))


def _tokens(text: str) -> list[str]:
    tokens, at, text = [], 0, text.strip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if not match:
            raise NotArithmetic(text)
        tokens.append(match[0].strip())
        at = match.end()
    return tokens


def _is_name(token: str) -> bool:
    return token.isidentifier() and token.isascii()


def _number(token: str) -> int:
    """Return the number of a constant: decimal, 0x…, octal after a 0, base#digits."""
    try:
        base, sign, digits = token.partition("#")
        if sign:
            return int(digits, int(base))
        if token[:2].lower() == "0x":
            return int(token, 16)
        return int(token, 8 if len(token) > 1 and token[0] == "0" else 10)
    except ValueError:
        raise NotArithmetic(token) from None


def _quotient(a: int, b: int) -> int:
    if b == 0:
        raise NotArithmetic("division by zero")
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _small(b: int) -> int:
    if not 0 <= b < 64:
        raise NotArithmetic(f"exponent or shift {b}")
    return b
