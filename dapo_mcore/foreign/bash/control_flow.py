"""Follows lists, branches, loops and groups of a script: which path is taken, and what is known after one that only a run decides.

Change here: what a condition, a loop or a subshell does to variables. What a simple command does is in follow.py.
"""

from __future__ import annotations

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from dapo_mcore.errors import ConfigError
from dapo_mcore.foreign.bash import conditions
from dapo_mcore.foreign.bash.expand import Expander
from dapo_mcore.foreign.bash.scope import Scope, merged
from dapo_mcore.foreign.bash.syntax import (
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


class Ends(Exception):
    """The script, a function or a loop ends here."""


class LeavesLoop(Ends):
    pass


class NextPass(LeavesLoop):
    pass


class LeavesFunction(Ends):
    pass


class ControlFlow(ABC):
    """Follows compound commands. `scope` has what is known here; `conditions` the unknown conditions of this path."""

    def __init__(self, name: str, scope: Scope) -> None:
        self._name = name
        self._scope = scope
        self._functions: dict[str, Command] = {}
        self._conditions: list[str] = []
        self._num_commands = self._depth = 0

    @property
    def _expander(self) -> Expander:
        return Expander(self._scope, self._output)

    @abstractmethod
    def _simple(self, command: Simple) -> bool | None:
        """Follow a simple command; return whether it succeeds, None if only a run would tell."""

    @abstractmethod
    def _output(self, source: str, line: int) -> Value:
        """Return what a command substitution gives."""

    @contextmanager
    def _deeper(self) -> Iterator[None]:
        """Count how deep functions, loops and files call one another. Raise ConfigError where it is too deep."""
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ConfigError(
                f"{self._name}: functions, loops or files call one another {_DEEPEST} deep; import a simpler script"
            )
        try:
            yield
        finally:
            self._depth -= 1

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
                f"{self._name}: more than {_MOST_COMMANDS} commands would run before the training; import a script without such loops"
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
        except Ends:
            pass
        finally:
            self._scope = before

    def _unless_it_ends(self, run: Callable[[], object]) -> None:
        """Follow a path that a condition has chosen; forget it if it ends the script, as a check of arguments does."""
        before = self._scope.copy()
        try:
            run()
        except LeavesLoop:
            raise
        except Ends:
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
            except LeavesLoop:
                pass
            except Ends:
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
        follow = {For: self._for, CountingFor: self._counting_for, While: self._while}[type(command)]
        with self._deeper(), suppress(LeavesLoop):
            follow(command)
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
        with suppress(NextPass):
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


def _is_test(command: Command | None) -> bool:
    """Return True for a command whose outcome is a question, not a success that a script counts on."""
    if isinstance(command, Simple) and command.words and isinstance(command.words[0], Word):
        return command.words[0].plain in ("[", "[[", "test", "command", "which", "grep", "type", "hash")
    return isinstance(command, Expression)
