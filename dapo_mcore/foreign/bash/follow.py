"""Follows a script from command to command without running any: which commands it would call, with which words.

Change here: what a builtin command does to variables, and what is known after a condition that only a run would decide.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from dapo_mcore.errors import ConfigError
from dapo_mcore.foreign.bash import conditions, outputs
from dapo_mcore.foreign.bash.commands import parse
from dapo_mcore.foreign.bash.expand import Expander, not_run
from dapo_mcore.foreign.bash.scope import Scope, merged
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
from dapo_mcore.foreign.bash.values import Value
from dapo_mcore.foreign.bash.words import Word

_MOST_COMMANDS = 50_000
_DEEPEST = 30
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


class _Ends(Exception):
    """The script, a function or a loop ends here."""


class _LeavesLoop(_Ends):
    pass


class _NextPass(_LeavesLoop):
    pass


class _LeavesFunction(_Ends):
    pass


def follow(text: str, file: Path, sourced: Callable[[str], Path | None]) -> Followed:
    """Return what a script would call, read as if run with an empty environment and without arguments.

    text: the script; file: its path. sourced: the file that `source NAME` means, None if it is not to be read.
    Raises ConfigError where bash could not read the script either, and for loops without an end.
    """
    follower = _Follower(file, sourced)
    try:
        with suppress(_Ends):
            follower.run(parse(text, file.name))
    except RecursionError:
        raise ConfigError(
            f"{file.name}: brackets or commands inside one another too deep to read; import a simpler script"
        ) from None
    return Followed(tuple(follower.calls), tuple(dict.fromkeys(follower.notes)))


class _Follower:
    def __init__(self, file: Path, sourced: Callable[[str], Path | None]) -> None:
        self.calls: list[Call] = []
        self.notes: list[str] = []
        self._file, self._sourced = file, sourced
        self._scope = Scope(str(file))
        self._functions: dict[str, Command] = {}
        self._conditions: list[str] = []
        self._num_commands = self._depth = 0

    @property
    def _expander(self) -> Expander:
        return Expander(self._scope, self._output)

    def run(self, commands: Sequence[Listed]) -> bool | None:
        status: bool | None = True
        for listed in commands:
            status = self._listed(listed)
        return status

    def _listed(self, listed: Listed) -> bool | None:
        status: bool | None = True
        before: Command | None = None
        for joint, negated, command in listed.steps:
            wanted = {"&&": True, "||": False}.get(joint)
            if wanted is not None and status is (not wanted):
                continue
            if wanted is None or (status is None and wanted and not _is_test(before)):
                status = self._command(command)
            else:
                status = self._perhaps(status is wanted, command)
            status = conditions.opposite(status) if negated else status
            before = command
        return status

    def _perhaps(self, certain: bool, command: Command) -> bool | None:
        """Follow the right side of `&&` or `||`: if it ends the script, a person's run goes on without it."""
        held: list[bool | None] = [None]

        def run() -> None:
            held[0] = self._command(command)

        if certain:
            self._unless_it_ends(run)
        else:
            line = getattr(command, "line", 0)
            self._fork(
                [run, None], f"line {line}: a command before it decides" if line else "a command before it decides"
            )
        return held[0] if certain else None

    def _command(self, command: Command) -> bool | None:
        self._num_commands += 1
        if self._num_commands > _MOST_COMMANDS:
            raise ConfigError(
                f"{self._file.name}: more than {_MOST_COMMANDS} commands would run before the training; import a script without such loops"
            )
        match command:
            case Simple():
                return self._simple(command)
            case Expression():
                value = self._expander.arithmetic(command.body)
                return value.text != "0" if value.is_certain else None
            case If():
                return self._if(command)
            case For() | CountingFor() | While():
                return self._loop(command)
            case Case():
                return self._case(command)
            case Function():
                self._functions[command.name] = command.body
                return True
            case Group():
                return self._group(command)

    def _group(self, group: Group) -> bool | None:
        if not group.subshell:
            return self.run(group.body)
        with self._apart():
            return self.run(group.body)
        return None

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Follow a subshell: what it sets is lost, and only itself may end."""
        before = self._scope.copy()
        try:
            yield
        except _Ends:
            pass
        finally:
            self._scope = before

    def _unless_it_ends(self, run: Callable[[], object]) -> None:
        """Follow a path that a condition has chosen; forget it if it ends the script, as a check of arguments does."""
        before = self._scope.copy()
        try:
            run()
        except _LeavesLoop:
            raise
        except _Ends:
            self._scope = before

    def _fork(self, paths: Sequence[Callable[[], object] | None], condition: str) -> None:
        """Follow each path (None: nothing happens) and keep what holds after every one that goes on."""
        before, after = self._scope, []
        for path in paths:
            self._scope = before.copy()
            self._conditions.append(condition)
            try:
                if path:
                    path()
            except _LeavesLoop:
                pass
            except _Ends:
                continue
            finally:
                self._conditions.pop()
            after.append(self._scope)
        self._scope = merged(after, condition) if after else before

    def _if(self, command: If) -> bool | None:
        """Follow the arm that is taken; from the first condition that is not known on, all arms that may be."""
        for number, (condition, body) in enumerate(command.arms):
            status = True if condition is None else self.run(condition)
            if status is True:
                self._unless_it_ends(lambda body=body: self.run(body))
                return None
            if status is None:
                arms = command.arms[number:]
                paths: list[Callable[[], object] | None] = [lambda body=body: self.run(body) for _, body in arms]
                if arms[-1][0] is not None:
                    paths.append(None)
                self._fork(paths, f"line {command.line}: {command.text}")
                return None
        return None

    def _case(self, command: Case) -> bool | None:
        value = self._expander.one(command.word)
        text = conditions.text_in_empty_environment(value)
        if text is not None:
            for patterns, body in command.arms:
                if any(fnmatch.fnmatchcase(text, self._expander.one(pattern).text) for pattern in patterns):
                    self._unless_it_ends(lambda body=body: self.run(body))
                    break
            return None
        paths: list[Callable[[], object] | None] = [lambda body=body: self.run(body) for _, body in command.arms]
        self._fork([*paths, None], f"line {command.line}: {command.text}")
        return None

    def _loop(self, command: For | CountingFor | While) -> bool | None:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self._too_deep()
        try:
            {For: self._for, CountingFor: self._counting_for, While: self._while}[type(command)](command)
        except _LeavesLoop:
            pass
        finally:
            self._depth -= 1
        return None

    def _for(self, command: For) -> None:
        if command.words is None:
            values = list(self._scope.arguments)
        else:
            values = [value for word in command.words for value in self._expander.fields(word)]
        for value in values:
            self._scope.set(command.name, value)
            self._pass(command.body)

    def _counting_for(self, command: CountingFor) -> None:
        self._expander.arithmetic(command.start)
        while True:
            condition = self._expander.arithmetic(command.condition)
            if not condition.is_certain:
                self._fork([lambda: self.run(command.body), None], f"line {command.line}: {command.text}")
                return
            if condition.text == "0" and command.condition.parts:
                return
            self._pass(command.body)
            self._expander.arithmetic(command.step)

    def _pass(self, body: Sequence[Listed]) -> None:
        """Follow one pass of a loop, which counts as a command: a loop without an end is refused."""
        self._command(Simple((), (), 0))
        with suppress(_NextPass):
            self.run(body)

    def _while(self, command: While) -> None:
        """Follow a loop as long as its condition is known to hold; `while true` and what only a run decides once."""
        once = "true" in command.text.split() or ":" in command.text.split()
        while True:
            status = self.run(command.condition)
            status = conditions.opposite(status) if command.until else status
            if status is False:
                return
            if status is None:
                self._fork([lambda: self.run(command.body), None], f"line {command.line}: {command.text}")
                return
            self._pass(command.body)
            if once:
                return

    def _simple(self, command: Simple) -> bool | None:
        if not command.words:
            for assignment in command.assignments:
                self._assign(assignment)
            return True
        first = command.words[0]
        if isinstance(first, Word) and first.plain in _DECLARATIONS:
            return self._declare(command)
        is_test = isinstance(first, Word) and first.plain == "[["
        expand = (lambda word: [self._expander.one(word)]) if is_test else self._expander.fields
        words = [value for word in command.words if isinstance(word, Word) for value in expand(word)]
        return self._call(words, command.line) if words else True

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
            "exit": lambda: self._end(_Ends),
            "return": lambda: self._end(_LeavesFunction),
            "break": lambda: self._end(_LeavesLoop),
            "continue": lambda: self._end(_NextPass),
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

    def _end(self, kind: type[_Ends]) -> bool:
        raise kind

    def _too_deep(self) -> ConfigError:
        return ConfigError(
            f"{self._file.name}: functions, loops or files call one another {_DEEPEST} deep; import a simpler script"
        )

    def _function(self, name: str, arguments: list[Value]) -> bool | None:
        """Follow a function. Its `local` variables stay visible after it, which scripts do not rely on."""
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self._too_deep()
        before = (self._scope.arguments, self._scope.in_function)
        self._scope.arguments, self._scope.in_function = arguments, True
        try:
            return self._command(self._functions[name])
        except _LeavesFunction:
            return None
        finally:
            self._depth -= 1
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
            raise ConfigError(f"{self._file.name} line {line}: {path}: {error.strerror}") from None
        outer, self._file = self._file, path
        try:
            return self._deeper(commands)
        finally:
            self._file = outer

    def _inner(self, words: list[Value], line: int) -> bool | None:
        """Follow the text that `eval` or `bash -c` would run."""
        text = " ".join(word.text for word in words)
        try:
            commands = parse(text, self._file.name, words[0].line if words else line)
        except ConfigError:
            self.notes.append(f"line {line}: a text run as a script could not be read")
            return None
        return self._deeper(commands)

    def _deeper(self, commands: Sequence[Listed]) -> bool | None:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self._too_deep()
        try:
            return self.run(commands)
        finally:
            self._depth -= 1

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
            commands = parse(source, self._file.name, line)
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


def _is_test(command: Command | None) -> bool:
    """Return True for a command whose outcome is a question, not a success that a script counts on."""
    if isinstance(command, Simple) and command.words and isinstance(command.words[0], Word):
        return command.words[0].plain in ("[", "[[", "test", "command", "which", "grep", "type", "hash")
    return isinstance(command, Expression)
