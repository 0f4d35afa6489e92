"""Reads the text of a script into commands (syntax.py). Nothing is run here.

Change here: which of bash's commands are read, and how.
"""

from __future__ import annotations

import re

from dapo_mcore.foreign.bash.syntax import (
    Assignment,
    Case,
    Command,
    CountingFor,
    Expression,
    For,
    Function,
    Group,
    If,
    Listed,
    Simple,
    While,
)
from dapo_mcore.foreign.bash.words import META, Scanner, Word, nested

_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(\[[^]\n]*\])?(\+?=)")
_REDIRECTION = re.compile(r"(?:\d+|\{\w+\})?(?:<<<|<<-?|<>|>>|>\||[<>]&|&>>?|<|>)")
_INSIDE_TEST = frozenset(" \t\n;")
_END_WORDS = frozenset({"then", "else", "elif", "fi", "do", "done", "esac", "}"})


def parse(text: str, name: str, first_line: int = 1) -> tuple[Listed, ...]:
    """Return the commands of a script.

    name: the file, for messages. Raises ConfigError with the line where brackets, quotes or keywords do not match.
    """
    parser = _Parser(Scanner(text, name, first_line))
    commands = parser.commands(frozenset())
    if parser.scanner.at < len(parser.scanner.text):
        raise parser.scanner.error(f"{parser.scanner.char!r} without its opening")
    return commands


class _Parser:
    def __init__(self, scanner: Scanner) -> None:
        self.scanner = scanner
        self._documents: list[tuple[str, bool]] = []

    def commands(self, ends: frozenset[str]) -> tuple[Listed, ...]:
        """Return the commands up to one of the keywords or signs in `ends`, which stays unread."""
        found: list[Listed] = []
        while self._past_separators() and not self._is_at(ends):
            if self.scanner.char == ")" or self._keyword() in _END_WORDS:
                break
            before = self.scanner.at
            found.append(self._listed())
            if self.scanner.at == before:
                raise self.scanner.error(f"{self.scanner.char!r} is not expected here")
        return tuple(found)

    def _past_separators(self) -> bool:
        """Skip blanks, comments, ends of lines, `;` and `&`; return False at the end of the script."""
        scanner = self.scanner
        while True:
            scanner.skip_blanks()
            if scanner.char == "\n":
                self._end_line()
            elif scanner.char and scanner.char in ";&" and not scanner.starts(";;") and not scanner.starts(";&"):
                scanner.at += 1
            else:
                return bool(scanner.char)

    def _end_line(self) -> None:
        """Go past the end of the line and the here-documents that follow it."""
        scanner = self.scanner
        scanner.at += 1
        for mark, tabs in self._documents:
            while scanner.at < len(scanner.text):
                end = scanner.text.find("\n", scanner.at)
                end = len(scanner.text) if end < 0 else end
                line = scanner.text[scanner.at : end]
                scanner.at = end + 1
                if (line.lstrip("\t") if tabs else line) == mark:
                    break
        self._documents.clear()

    def _is_at(self, ends: frozenset[str]) -> bool:
        return self._keyword() in ends or any(not end.isalpha() and self.scanner.starts(end) for end in ends)

    def _keyword(self) -> str:
        """Return the word here if it is plain letters and signs, as keywords are; do not go past it."""
        match = re.compile(r"[A-Za-z_!{}\[\]]+(?=[\s;&|()<>]|$)").match(self.scanner.text, self.scanner.at)
        return match[0] if match else ""

    def _expect(self, keyword: str, opened: int, what: str) -> None:
        if not self._past_separators() or self._keyword() != keyword:
            raise self.scanner.error(f"the {what} of line {opened} has no {keyword}")
        self.scanner.at += len(keyword)

    def _listed(self) -> Listed:
        steps: list[tuple[str, bool, Command]] = []
        joint = ""
        while True:
            self.scanner.skip_blanks()
            while joint and self.scanner.char == "\n":
                self._end_line()
                self.scanner.skip_blanks()
            negated = False
            while self._keyword() in ("!", "time"):
                negated ^= self._keyword() == "!"
                self.scanner.at += len(self._keyword())
                self.scanner.skip_blanks()
            steps.append((joint, negated, self._command()))
            self.scanner.skip_blanks()
            joint = next((sign for sign in ("&&", "||", "|&", "|") if self.scanner.starts(sign)), "")
            if not joint:
                return Listed(tuple(steps))
            self.scanner.at += len(joint)
            joint = "|" if joint == "|&" else joint

    def _command(self) -> Command:
        readers = {"if": self._if, "for": self._for, "while": self._while, "until": self._while, "case": self._case}
        keyword = self._keyword()
        if keyword in readers or keyword in ("{", "function"):
            command = readers.get(keyword, self._group if keyword == "{" else self._function)()
        elif self.scanner.starts("((") and (expression := self._expression()) is not None:
            command = expression
        elif self.scanner.char == "(":
            command = self._group()
        elif match := re.compile(r"[\w:.-]+[ \t]*\([ \t]*\)").match(self.scanner.text, self.scanner.at):
            command = self._function_after(match[0].split("(")[0].strip(), match.end())
        else:
            return self._simple()
        self._redirections()
        return command

    def _head(self, start: int) -> str:
        """Return the line at `start` for people."""
        end = self.scanner.text.find("\n", start)
        line = self.scanner.text[start : end if end >= 0 else None]
        return " ".join(re.sub(r"[;\s]*(then|do)?\s*$", "", line).split())[:80]

    def _if(self) -> If:
        start, line, arms = self.scanner.at, self.scanner.line, []
        keyword = "if"
        while keyword in ("if", "elif"):
            self.scanner.at += len(keyword)
            condition = self.commands(frozenset({"then"}))
            self._expect("then", line, "if")
            arms.append((condition, self.commands(frozenset({"elif", "else", "fi"}))))
            keyword = self._keyword()
        if keyword == "else":
            self.scanner.at += 4
            arms.append((None, self.commands(frozenset({"fi"}))))
        self._expect("fi", line, "if")
        return If(tuple(arms), line, self._head(start))

    def _body(self, line: int, what: str) -> tuple[Listed, ...]:
        self._past_separators()
        if self._keyword() == "{":
            return self._group().body
        self._expect("do", line, what)
        body = self.commands(frozenset({"done"}))
        self._expect("done", line, what)
        return body

    def _for(self) -> For | CountingFor:
        start, line = self.scanner.at, self.scanner.line
        self.scanner.at += 3
        self.scanner.skip_blanks()
        if self.scanner.starts("(("):
            expression = self._expression()
            parts = self._expression_text.split(";") if expression else []
            if len(parts) != 3:
                raise self.scanner.error("for ((…)) takes three expressions with ; between them", line)
            words = [nested(part, self.scanner.name, line) for part in parts]
            return CountingFor(*words, self._body(line, "for"), line, self._head(start))
        name, words = self.scanner.word().plain or "", None
        self.scanner.skip_blanks()
        if self.scanner.char == "\n":
            self._past_separators()
        if self._keyword() == "in":
            self.scanner.at += 2
            words = self._words_of_line()
        return For(name, words, self._body(line, "for"), line, self._head(start))

    def _words_of_line(self) -> tuple[Word, ...]:
        words = []
        while True:
            self.scanner.skip_blanks()
            if self.scanner.char in META or not self.scanner.char:
                return tuple(words)
            words.append(self.scanner.word())

    def _while(self) -> While:
        start, line, keyword = self.scanner.at, self.scanner.line, self._keyword()
        self.scanner.at += 5
        condition = self.commands(frozenset({"do"}))
        return While(condition, self._body(line, keyword), keyword == "until", line, self._head(start))

    def _case(self) -> Case:
        start, line, arms = self.scanner.at, self.scanner.line, []
        self.scanner.at += 4
        self.scanner.skip_blanks()
        word = self.scanner.word()
        self._expect("in", line, "case")
        while self._past_separators() and self._keyword() != "esac":
            arms.append((self._patterns(), self.commands(frozenset({";;", ";&", "esac"}))))
            for sign in (";;&", ";;", ";&"):
                if self.scanner.starts(sign):
                    self.scanner.at += len(sign)
                    break
        self._expect("esac", line, "case")
        return Case(word, tuple(arms), line, self._head(start))

    def _patterns(self) -> tuple[Word, ...]:
        if self.scanner.char == "(":
            self.scanner.at += 1
        patterns = []
        while self.scanner.char != ")":
            self.scanner.skip_blanks()
            if self.scanner.char in ("", "\n", ";"):
                raise self.scanner.error("a pattern of case has no )")
            patterns.append(self.scanner.word())
            self.scanner.skip_blanks()
            if self.scanner.char == "|":
                self.scanner.at += 1
            elif self.scanner.char != ")":
                raise self.scanner.error("a pattern of case has no )")
        self.scanner.at += 1
        return tuple(patterns)

    def _group(self) -> Group:
        opening, line = self.scanner.char, self.scanner.line
        closing = "}" if opening == "{" else ")"
        self.scanner.at += 1
        body = self.commands(frozenset({closing}))
        if self.scanner.char != closing:
            raise self.scanner.error(f"the {opening} of line {line} is never closed")
        self.scanner.at += 1
        return Group(body, opening == "(")

    def _function(self) -> Function:
        self.scanner.at += len("function")
        self.scanner.skip_blanks()
        name = self.scanner.word().plain or ""
        self.scanner.skip_blanks()
        end = self.scanner.at
        if match := re.compile(r"\([ \t]*\)").match(self.scanner.text, end):
            end = match.end()
        return self._function_after(name, end)

    def _function_after(self, name: str, end: int) -> Function:
        self.scanner.at = end
        self._past_separators()
        return Function(name, self._command())

    def _expression(self) -> Expression | None:
        """Return the `((…))` that begins here; None if it is a subshell in a subshell."""
        start, line = self.scanner.at, self.scanner.line
        self.scanner.at += 2
        self._expression_text = self.scanner.enclosed("(", ")")
        if self.scanner.char != ")":
            self.scanner.at = start
            return None
        self.scanner.at += 1
        return Expression(nested(self._expression_text, self.scanner.name, line), line)

    def _simple(self) -> Simple:
        line = self.scanner.line
        assignments: list[Assignment] = []
        words: list[Word | Assignment] = []
        while True:
            self.scanner.skip_blanks()
            if self._redirection():
                continue
            if self.scanner.starts("<(") or self.scanner.starts(">("):
                words.append(Word((self.scanner.process(),), self.scanner.line))
                continue
            if self.scanner.char in META or not self.scanner.char:
                break
            match = _ASSIGNMENT.match(self.scanner.text, self.scanner.at)
            if match and (not words or _declares(words)):
                (words if words else assignments).append(self._assignment(match))
                continue
            if not words and self.scanner.starts("[[") and self._keyword() == "[[":
                words = self._test()
                continue
            words.append(self.scanner.word())
        if not words and not assignments and self.scanner.char and self.scanner.char not in "\n;&|":
            raise self.scanner.error(f"{self.scanner.char!r} is not expected here")
        return Simple(tuple(assignments), tuple(words), line)

    def _test(self) -> list[Word | Assignment]:
        """Return the words of `[[ … ]]` with both brackets; its signs are words here."""
        line, words = self.scanner.line, []
        while True:
            while self.scanner.char == "\n" or self.scanner.starts("\\\n") or self.scanner.char in (" ", "\t"):
                self.scanner.at += 1
            if not self.scanner.char or self.scanner.char == ";":
                raise self.scanner.error(f"the [[ of line {line} is never closed")
            words.append(self.scanner.word(_INSIDE_TEST))
            if words[-1].plain == "]]":
                return words

    def _assignment(self, match: re.Match[str]) -> Assignment:
        scanner, line = self.scanner, self.scanner.line
        scanner.at = match.end()
        index = nested(match[2][1:-1], scanner.name, line) if match[2] else None
        if scanner.char == "(":
            value: Word | tuple = self._array()
        else:
            value = scanner.word()
        return Assignment(match[1], index, match[3] == "+=", value, line)

    def _array(self) -> tuple[tuple[Word | None, Word], ...]:
        scanner, line, items = self.scanner, self.scanner.line, []
        scanner.at += 1
        while True:
            scanner.skip_blanks()
            if scanner.char == "\n":
                self._end_line()
            elif scanner.char == ")":
                scanner.at += 1
                return tuple(items)
            elif scanner.starts("<(") or scanner.starts(">("):
                items.append((None, Word((scanner.process(),), scanner.line)))
            elif not scanner.char or scanner.char in META:
                raise scanner.error(f"the array of line {line} has no )")
            elif match := re.compile(r"\[([^]\n]+)\]=").match(scanner.text, scanner.at):
                scanner.at = match.end()
                items.append((nested(match[1], scanner.name, scanner.line), scanner.word()))
            else:
                items.append((None, scanner.word()))

    def _redirections(self) -> None:
        self.scanner.skip_blanks()
        while self._redirection():
            self.scanner.skip_blanks()

    def _redirection(self) -> bool:
        """Go past the redirection that begins here; return False if none does."""
        scanner = self.scanner
        match = _REDIRECTION.match(scanner.text, scanner.at)
        if not match or (match[0] in ("<", ">") and scanner.text[match.end() : match.end() + 1] == "("):
            return False
        scanner.at = match.end()
        while scanner.char in (" ", "\t"):
            scanner.at += 1
        if scanner.starts("<("):
            scanner.process()
            return True
        target = scanner.word()
        if match[0].lstrip("0123456789") in ("<<", "<<-"):
            mark = "".join(getattr(part, "text", "") for part in target.parts)
            self._documents.append((mark, match[0].endswith("-")))
        return True


def _declares(words: list[Word | Assignment]) -> bool:
    """Return True after `export`, `local` and the like, whose arguments are assignments too."""
    first = words[0]
    return isinstance(first, Word) and first.plain in ("export", "local", "declare", "readonly", "typeset")
