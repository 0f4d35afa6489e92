"""The variables and arguments of a script at one place of it, as far as the script itself says them.

Change here: what a variable is that the script does not set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dapo_mcore.errors import ConfigError
from dapo_mcore.foreign.bash.values import Value, derived, either, not_known

_LONGEST_TEXT = 1 << 20
_MOST_ITEMS = 20_000
Array = dict[str, Value]
"""The items of an array by index, in order."""
_FOLDERS = {"HOME": "~", "PWD": "."}
"""Folders that a path may begin with whoever runs the script."""


@dataclass(slots=True)
class Scope:
    """Variables by name; `arguments` of the script (none) or of the function that runs."""

    script: str
    variables: dict[str, Value | Array] = field(default_factory=dict)
    arguments: list[Value] = field(default_factory=list)
    in_function: bool = False

    def copy(self) -> Scope:
        variables = {name: dict(held) if isinstance(held, dict) else held for name, held in self.variables.items()}
        return Scope(self.script, variables, list(self.arguments), self.in_function)

    def array(self, name: str, line: int) -> list[Value] | None:
        """Return the items of `name[@]`; None for a variable that is not set."""
        if name in ("@", "*"):
            return [item.at(line) for item in self.arguments]
        if name == "BASH_SOURCE":
            return [Value(self.script, line)]
        held = self.variables.get(name)
        return [held] if isinstance(held, Value) else list(held.values()) if held is not None else None

    def value(self, name: str, line: int, index: str = "") -> Value | None:
        """Return a parameter's value; None if the script leaves it to the environment."""
        if name in ("@", "*") or index in ("@", "*"):
            items = self.array(name, line)
            return joined(items, line) if items is not None else None
        if name == "0" or name == "BASH_SOURCE":
            return Value(self.script, line)
        if name.isdecimal():
            return self._argument(int(name), line)
        if name in ("#", "?", "-"):
            return Value({"#": str(len(self.arguments)), "?": "0", "-": ""}[name], line)
        held = self.variables.get(name)
        if isinstance(held, dict):
            held = held.get(index or "0", Value("", line))
        if held is None:
            return Value(_FOLDERS[name], line) if name in _FOLDERS else None
        return held.at(line)

    def _argument(self, number: int, line: int) -> Value | None:
        if number <= len(self.arguments):
            return self.arguments[number - 1].at(line)
        return Value("", line) if self.in_function else None

    def set(self, name: str, value: Value, index: str = "", append: bool = False) -> None:
        held = self.variables.get(name)
        if index or isinstance(held, dict):
            items = held if isinstance(held, dict) else {"0": held} if held is not None else {}
            items[index or "0"] = _added(items.get(index or "0"), value) if append else value
            self.variables[name] = items
        else:
            self.variables[name] = _added(held, value) if append else value
        if len(value.text) > _LONGEST_TEXT:
            raise ConfigError(
                f"{self.script} line {value.line}: {name} grows beyond {_LONGEST_TEXT} characters; import a simpler script"
            )

    def set_array(self, name: str, items: Sequence[tuple[str, Value]], append: bool) -> None:
        """Set the items of an array; those without an index ("") follow the last one."""
        held = self.variables.get(name) if append else None
        array: Array = dict(held) if isinstance(held, dict) else {"0": held} if held is not None else {}
        position = 1 + max((int(key) for key in array if key.isdecimal()), default=-1)
        for index, value in items:
            position = int(index) if index.isdecimal() else position
            array[index or str(position)] = value
            position += 1
        if len(array) > _MOST_ITEMS:
            raise ConfigError(f"{self.script}: {name} grows beyond {_MOST_ITEMS} items; import a simpler script")
        self.variables[name] = array


def unset(name: str, line: int) -> Value:
    """Return what stands for a parameter that only the environment knows."""
    shown = {"$": "process number", "!": "process number"}.get(name, f"argument {name}" if name.isdecimal() else name)
    return not_known(shown, f"${{{name}}}", line)


def joined(items: Sequence[Value], line: int) -> Value:
    return derived(lambda *texts: " ".join(texts), items, line)


def merged(scopes: Sequence[Scope], condition: str) -> Scope:
    """Return what is known after a condition whose paths leave these scopes."""
    first = scopes[0].copy()
    for name in dict.fromkeys(name for scope in scopes for name in scope.variables):
        held = [scope.variables.get(name) for scope in scopes]
        if all(value == held[0] for value in held):
            continue
        if any(isinstance(value, dict) for value in held):
            first.variables[name] = _either_array(held, condition)
        else:
            first.variables[name] = either(held, condition)
    return first


def _either_array(held: Sequence[Value | Array | None], condition: str) -> Array:
    arrays = [value if isinstance(value, dict) else {} if value is None else {"0": value} for value in held]
    keys = dict.fromkeys(key for array in arrays for key in array)
    return {key: either([array.get(key) for array in arrays], condition) for key in keys}


def _added(held: Value | None, value: Value) -> Value:
    return derived(lambda a, b: a + b, [held, value], value.line) if held is not None else value
