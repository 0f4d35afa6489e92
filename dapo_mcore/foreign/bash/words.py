"""Words of bash as trees: literal text, `${…}`, `$((…))` and `$(…)`, each with or without quotes. Nothing is expanded here.

Change here: how bash's quoting and its expansions are read.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass

from dapo_mcore.errors import ConfigError

META = frozenset(" \t\n;&|()<>")
"""Characters that end a word outside quotes."""
ESCAPED_SLASH = "\0"
"""Stands for `\\/` in the pattern of `${name/pattern/text}`, where a plain / ends the pattern."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|[0-9]|[@*#?$!-]")
_BRACED_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|[0-9]+|[@*#?$!-]")
_OPERATORS = (
    ":-",
    ":=",
    ":+",
    ":?",
    "##",
    "%%",
    "//",
    "/#",
    "/%",
    "^^",
    ",,",
    "-",
    "=",
    "+",
    "?",
    "#",
    "%",
    "/",
    ":",
    "^",
    ",",
    "@",
)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", "'": "'", '"': '"'}


@dataclass(frozen=True, slots=True)
class Literal:
    text: str
    quoted: bool


@dataclass(frozen=True, slots=True)
class Parameter:
    """`${name[index]op arg}`. index: "" for none. op: "" for none, `length` for `${#name}`, `indirect` for `${!name}`."""

    name: str
    index: Word | None
    op: str
    arg: Word | None
    quoted: bool


@dataclass(frozen=True, slots=True)
class Arithmetic:
    body: Word
    quoted: bool


@dataclass(frozen=True, slots=True)
class Output:
    """The output of a command: `$(…)`, backquotes and `<(…)`."""

    source: str
    quoted: bool


@dataclass(frozen=True, slots=True)
class Word:
    parts: tuple[Literal | Parameter | Arithmetic | Output, ...]
    line: int

    @property
    def plain(self) -> str | None:
        """The text of a word without quotes and expansions, such as a keyword; None for any other word."""
        if all(isinstance(part, Literal) and not part.quoted for part in self.parts):
            return "".join(part.text for part in self.parts)
        return None


class Scanner:
    """The text of a script and a place in it."""

    def __init__(self, text: str, name: str, first_line: int = 1) -> None:
        self.text = text.replace("\r\n", "\n")
        self.name = name
        self.at = 0
        self._first_line = first_line
        self._ends = [place for place, char in enumerate(self.text) if char == "\n"]

    @property
    def line(self) -> int:
        return self.line_at(self.at)

    def line_at(self, place: int) -> int:
        return bisect_right(self._ends, place - 1) + self._first_line

    @property
    def char(self) -> str:
        """The character here; "" at the end."""
        return self.text[self.at : self.at + 1]

    def starts(self, text: str) -> bool:
        return self.text.startswith(text, self.at)

    def error(self, what: str, line: int | None = None) -> ConfigError:
        return ConfigError(
            f"{self.name} line {line or self.line}: {what}; `bash -n {self.name}` shows whether bash itself can read the script"
        )

    def skip_blanks(self) -> None:
        """Go past blanks, continued lines and a comment; not past the end of the line."""
        while True:
            if self.char in (" ", "\t"):
                self.at += 1
            elif self.starts("\\\n"):
                self.at += 2
            elif self.char == "#":
                end = self.text.find("\n", self.at)
                self.at = len(self.text) if end < 0 else end
            else:
                return

    def word(self, stop: frozenset[str] = META) -> Word:
        """Return the word that begins here and go past it. `stop` holds the characters that end it outside quotes."""
        line = self.line
        parts: list[Literal | Parameter | Arithmetic | Output] = []
        while self.at < len(self.text) and self.char not in stop:
            self._unquoted(parts)
        return Word(_joined(parts), line)

    def process(self) -> Output:
        """Return the `<(…)` or `>(…)` that begins here and go past it."""
        self.at += 2
        return Output(self.enclosed("(", ")"), False)

    def enclosed(self, opening: str, closing: str) -> str:
        """Return the text up to the bracket that closes the one just before, with brackets in quotes not counted."""
        start, depth = self.at, 1
        while self.at < len(self.text):
            char = self.char
            if char == "\\":
                self.at += 2
                continue
            if char in "'\"":
                self._past_quotes(char)
                continue
            if char == "#" and opening == "(" and self.text[self.at - 1] in " \t\n;(":
                self.skip_blanks()
                continue
            depth += (char == opening) - (char == closing)
            self.at += 1
            if depth == 0:
                return self.text[start : self.at - 1]
        raise self.error(f"a {opening} is never closed", self.line_at(start))

    def _past_quotes(self, quote: str) -> None:
        start = self.at
        self.at += 1
        while self.at < len(self.text) and self.char != quote:
            if quote == '"' and self.starts("$("):
                self.at += 2
                self.enclosed("(", ")")
                continue
            self.at += 2 if self.char == "\\" and quote == '"' else 1
        if self.at >= len(self.text):
            raise self.error(f"the quote {quote} is never closed", self.line_at(start))
        self.at += 1

    def _unquoted(self, parts: list) -> None:
        char = self.char
        if self.starts("\\\n"):
            self.at += 2
        elif char == "\\":
            parts.append(Literal(self.text[self.at + 1 : self.at + 2], True))
            self.at += 2
        elif char == "'":
            parts.append(Literal(self._single(), True))
        elif char == '"':
            parts.extend(self.double_quoted())
        elif self.starts("$'"):
            self.at += 1
            parts.append(Literal(self._ansi(), True))
        elif self.starts('$"'):
            self.at += 1
        elif char in "$`":
            parts.append(self._expansion(False))
        else:
            parts.append(Literal(char, False))
            self.at += 1

    def _single(self) -> str:
        end = self.text.find("'", self.at + 1)
        if end < 0:
            raise self.error("the quote ' is never closed")
        text, self.at = self.text[self.at + 1 : end], end + 1
        return text

    def _ansi(self) -> str:
        line, text = self.line, []
        self.at += 1
        while self.char != "'":
            if self.at >= len(self.text):
                raise self.error("the quote ' is never closed", line)
            if self.char == "\\":
                self.at += 1
                text.append(_ESCAPES.get(self.char, "\\" + self.char))
            else:
                text.append(self.char)
            self.at += 1
        self.at += 1
        return "".join(text)

    def double_quoted(self) -> list:
        line = self.line
        parts: list = []
        self.at += 1
        while self.char != '"':
            if self.at >= len(self.text):
                raise self.error('the quote " is never closed', line)
            self.inside_quotes(parts)
        self.at += 1
        return parts or [Literal("", True)]

    def inside_quotes(self, parts: list) -> None:
        following = self.text[self.at + 1 : self.at + 2]
        if self.starts("\\\n"):
            self.at += 2
        elif self.char == "\\" and following in ('"', "\\", "$", "`"):
            parts.append(Literal(following, True))
            self.at += 2
        elif self.char in "$`":
            parts.append(self._expansion(True))
        else:
            parts.append(Literal(self.char, True))
            self.at += 1

    def _expansion(self, quoted: bool) -> Literal | Parameter | Arithmetic | Output:
        if self.char == "`":
            return self._backquotes(quoted)
        if self.starts("$((") and (body := self._arithmetic()) is not None:
            return Arithmetic(body, quoted)
        if self.starts("$("):
            self.at += 2
            return Output(self.enclosed("(", ")"), quoted)
        if self.starts("${"):
            self.at += 2
            return self._braced(quoted)
        if match := _NAME.match(self.text, self.at + 1):
            self.at = match.end()
            return Parameter(match[0], None, "", None, quoted)
        self.at += 1
        return Literal("$", quoted)

    def _backquotes(self, quoted: bool) -> Output:
        start = self.at
        self.at += 1
        while self.char != "`":
            if self.at >= len(self.text):
                raise self.error("the quote ` is never closed", self.line_at(start))
            self.at += 2 if self.char == "\\" else 1
        self.at += 1
        return Output(self.text[start + 1 : self.at - 1], quoted)

    def _arithmetic(self) -> Word | None:
        """Return the body of `$((…))`; None if it is a subshell in `$( (…) )`."""
        start = self.at
        self.at += 3
        body_at = self.at
        body = self.enclosed("(", ")")
        if self.char != ")":
            self.at = start
            return None
        self.at += 1
        return nested(body, self.name, self.line_at(body_at))

    def _braced(self, quoted: bool) -> Parameter:
        line, start = self.line, self.at
        op = ""
        if self.char in ("#", "!") and self.text[self.at + 1 : self.at + 2] != "}":
            op = "length" if self.char == "#" else "indirect"
            self.at += 1
        match = _BRACED_NAME.match(self.text, self.at)
        if not match:
            raise self.error(f"${{{self.text[start : start + 20]}… is no parameter", line)
        self.at = match.end()
        index = self._index()
        op = op or next((sign for sign in _OPERATORS if self.starts(sign)), "")
        if op not in ("", "length", "indirect"):
            self.at += len(op)
        body_at = self.at
        body = self.enclosed("{", "}")
        if op.startswith("/"):
            body = body.replace("\\/", ESCAPED_SLASH)
        arg = (
            nested(body, self.name, self.line_at(body_at), quoted)
            if body or op not in ("", "length", "indirect")
            else None
        )
        return Parameter(match[0], index, op, arg, quoted)

    def _index(self) -> Word | None:
        if self.char != "[":
            return None
        self.at += 1
        line = self.line
        return nested(self.enclosed("[", "]"), self.name, line)


def nested(text: str, name: str, line: int, quoted: bool = False) -> Word:
    """Return the word of a text inside an expansion: `quoted` as between double quotes."""
    scanner = Scanner(text, name, line)
    if not quoted:
        return scanner.word(frozenset())
    parts: list = []
    while scanner.at < len(scanner.text):
        if scanner.char == '"':
            parts.extend(scanner.double_quoted())
        else:
            scanner.inside_quotes(parts)
    return Word(_joined(parts), line)


def _joined(parts: list) -> tuple:
    """Return the parts with neighbouring literals of the same kind in one."""
    joined: list = []
    for part in parts:
        before = joined[-1] if joined else None
        if isinstance(part, Literal) and isinstance(before, Literal) and before.quoted == part.quoted:
            joined[-1] = Literal(before.text + part.text, part.quoted)
        else:
            joined.append(part)
    return tuple(joined)
