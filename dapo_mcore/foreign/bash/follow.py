"""Follows a script from command to command without running any: which commands it would call, with which words.

Change here: what a simple command does, such as a builtin one to variables. Branches and loops are followed in control_flow.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from dapo_mcore.errors import ConfigError
from dapo_mcore.foreign.bash import conditions, outputs
from dapo_mcore.foreign.bash.commands import parse
from dapo_mcore.foreign.bash.control_flow import ControlFlow, Ends, LeavesFunction, LeavesLoop, NextPass
from dapo_mcore.foreign.bash.expand import not_run
from dapo_mcore.foreign.bash.scope import Scope
from dapo_mcore.foreign.bash.syntax import (
    Assignment,
    Simple,
)
from dapo_mcore.foreign.bash.values import Value
from dapo_mcore.foreign.bash.words import Parameter, Word

_DECLARATIONS = ("export", "local", "declare", "readonly", "typeset")
_SHELLS = ("bash", "sh", "/bin/bash", "/bin/sh", "/usr/bin/bash")
_READING = ("read", "mapfile", "readarray")


@dataclass(frozen=True, slots=True)
class Call:
    """A command that the script would call. `depends`: the conditions under which it would."""

    words: tuple[Value, ...]
    line: int
    depends: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Followed:
    """The calls of a script in order, and what could not be followed, a sentence each."""

    calls: tuple[Call, ...]
    notes: tuple[str, ...]


def follow(text: str, file: Path, sourced: Callable[[str], Path | None]) -> Followed:
    """Return what a script would call, read as if run with an empty environment and without arguments.

    text: the script; file: its path. sourced: the file that `source NAME` means, None if it is not to be read.
    Raises ConfigError where bash could not read the script either, and for loops without an end.
    """
    follower = _Follower(file, sourced)
    try:
        with suppress(Ends):
            follower.run(parse(text, file.name))
    except RecursionError:
        raise ConfigError(
            f"{file.name}: brackets or commands inside one another too deep to read; import a simpler script"
        ) from None
    return Followed(tuple(follower.calls), tuple(dict.fromkeys(follower.notes)))


class _Follower(ControlFlow):
    def __init__(self, file: Path, sourced: Callable[[str], Path | None]) -> None:
        super().__init__(file.name, Scope(str(file)))
        self.calls: list[Call] = []
        self.notes: list[str] = []
        self._sourced = sourced

    def _simple(self, command: Simple) -> bool | None:
        if not command.words:
            for assignment in command.assignments:
                self._assign(assignment)
            return True
        self._note_arguments(command)
        first = command.words[0]
        if isinstance(first, Word) and first.plain in _DECLARATIONS:
            return self._declare(command)
        is_test = isinstance(first, Word) and first.plain == "[["
        expand = (lambda word: [self._expander.one(word)]) if is_test else self._expander.fields
        words = [value for word in command.words if isinstance(word, Word) for value in expand(word)]
        return self._call(words, command.line) if words else True

    def _note_arguments(self, command: Simple) -> None:
        """Note a command that gets the script's own arguments: it is read as if started without any."""
        words = [word for word in command.words if isinstance(word, Word)]
        named = [
            word for word in words for part in word.parts if isinstance(part, Parameter) and part.name in ("@", "*")
        ]
        if named and not self._scope.in_function and not self._scope.arguments:
            self.notes.append(
                f'line {named[0].line}: "$@" is what the script is started with; write settings that you give there into a copy of it'
            )

    def _declare(self, command: Simple) -> bool:
        for word in command.words[1:]:
            if isinstance(word, Assignment):
                self._assign(word)
            elif (
                (name := word.plain or "").isidentifier()
                and self._scope.in_function
                and command.words[0].plain == "local"
            ):
                self._scope.set(name, Value("", word.line))
        return True

    def _assign(self, assignment: Assignment) -> None:
        expander, name = self._expander, assignment.name
        if isinstance(assignment.value, Word):
            index = expander.one(assignment.index).text if assignment.index else ""
            value = expander.one(assignment.value)
            if value.text == f"${{{name}}}" and value.unknown:
                self._scope.variables.pop(name, None)
                return
            self._scope.set(name, value, index, assignment.append)
            return
        items: list[tuple[str, Value]] = []
        for key, word in assignment.value:
            fields = [expander.one(word)] if key else expander.fields(word)
            items += [(expander.one(key).text if key else "", field) for field in fields]
        self._scope.set_array(name, items, assignment.append)

    def _call(self, words: list[Value], line: int) -> bool | None:
        name, rest = words[0].text, words[1:]
        if name in self._functions:
            return self._function(name, rest)
        if name in ("[", "[[", "test"):
            return conditions.holds(rest[:-1] if name != "test" else rest)
        builtin = {
            "true": lambda: True,
            ":": lambda: True,
            "false": lambda: False,
            "exit": lambda: self._end(Ends),
            "return": lambda: self._end(LeavesFunction),
            "break": lambda: self._end(LeavesLoop),
            "continue": lambda: self._end(NextPass),
            "source": lambda: self._source(rest, line),
            ".": lambda: self._source(rest, line),
            "eval": lambda: self._inner(rest, line),
            "set": lambda: self._set(rest),
            "shift": lambda: self._shift(rest),
            "unset": lambda: self._unset(rest),
            "let": lambda: True,
            "cd": lambda: None,
        }.get(name)
        if builtin:
            return builtin()
        if name in _READING:
            return self._read(name, rest, line)
        if name == "printf" and rest[:1] and rest[0].text == "-v" and len(rest) > 2:
            self._scope.set(rest[1].text, not_run(" ".join(word.text for word in words), line))
            return True
        for number, word in enumerate(words[:-2]):
            flag = words[number + 1].text
            if word.text in _SHELLS and flag.startswith("-") and flag.endswith("c"):
                with self._apart():
                    self._inner([words[number + 2]], line)
                return None
        self.calls.append(Call(tuple(words), line, tuple(dict.fromkeys(self._conditions))))
        return None

    def _end(self, kind: type[Ends]) -> bool:
        raise kind

    def _function(self, name: str, arguments: list[Value]) -> bool | None:
        """Follow a function. Its `local` variables stay visible after it, which scripts do not rely on."""
        before = (self._scope.arguments, self._scope.in_function)
        with self._deeper():
            self._scope.arguments, self._scope.in_function = arguments, True
            try:
                return self._command(self._functions[name])
            except LeavesFunction:
                return None
            finally:
                self._scope.arguments, self._scope.in_function = before

    def _source(self, words: list[Value], line: int) -> bool | None:
        if not words:
            return None
        name = words[0]
        path = self._sourced(name.text) if name.is_certain else None
        if path is None:
            self.notes.append(f"line {line}: {name.text} is sourced and was not read: it is no script beside this one")
            return None
        try:
            commands = parse(path.read_text(encoding="utf-8", errors="replace"), path.name)
        except OSError as error:
            raise ConfigError(f"{self._name} line {line}: {path}: {error.strerror}") from None
        outer, self._name = self._name, path.name
        try:
            with self._deeper():
                return self.run(commands)
        finally:
            self._name = outer

    def _inner(self, words: list[Value], line: int) -> bool | None:
        """Follow the text that `eval` or `bash -c` would run."""
        text = " ".join(word.text for word in words)
        try:
            commands = parse(text, self._name, words[0].line if words else line)
        except ConfigError:
            self.notes.append(f"line {line}: a text run as a script could not be read")
            return None
        with self._deeper():
            return self.run(commands)

    def _set(self, words: list[Value]) -> bool:
        if words and words[0].text == "--":
            self._scope.arguments = words[1:]
        return True

    def _shift(self, words: list[Value]) -> bool:
        count = words[0].text if words else "1"
        self._scope.arguments = self._scope.arguments[int(count) if count.isdecimal() else 1 :]
        return True

    def _unset(self, words: list[Value]) -> bool:
        for word in words:
            self._scope.variables.pop(word.text, None)
        return True

    def _read(self, name: str, words: list[Value], line: int) -> bool | None:
        for word in words:
            if word.text.isidentifier():
                self._scope.set(word.text, not_run(f"{name} {word.text}", line))
        return None

    def _output(self, source: str, line: int) -> Value:
        """Return what a command substitution gives where it follows from its words; the commands are not calls."""
        try:
            commands = parse(source, self._name, line)
        except ConfigError:
            return not_run(source, line)
        steps = [step for listed in commands for step in listed.steps]
        if not steps or not all(isinstance(command, Simple) and command.words for _, _, command in steps):
            return not_run(source, line)
        words = [[value for word in step[2].words for value in self._expander.fields(word)] for step in steps]
        if len(words) == 2 and words[0][0].text == "cd" and words[1][0].text == "pwd":
            return replace(words[0][-1], line=line)
        if len(words) != 1 or not words[0]:
            return not_run(source, line)
        return self._printed(words[0], source, line)

    def _printed(self, words: list[Value], source: str, line: int) -> Value:
        text = outputs.printed([word.text for word in words])
        if text is None:
            return not_run(source, line)
        lacking = tuple(dict.fromkeys(name for word in words for name in word.unknown))
        depends = tuple(dict.fromkeys(place for word in words for place in word.depends))
        if lacking:
            return Value(f"$({' '.join(word.text for word in words)})", line, lacking, (), depends)
        return Value(text, line, (), (), depends)
