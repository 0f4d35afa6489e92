"""Nested YAML configurations as dotted settings, with OmegaConf's interpolations (`${a.b}`) resolved.

Change here: how YAML and its interpolations are read. Source: OmegaConf 2.3.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from dapo_mcore.errors import ConfigError
from dapo_mcore.foreign.read.script import NotThisDialect, text_of
from dapo_mcore.foreign.settings import ForeignRun, ForeignSetting, last_of_each_key

Tree = dict[str, Any]
_LEAF = re.compile(r"\$\{([^${}]*)\}")
_DEEPEST = 40
_PARENTS = 6


class _Loader(yaml.SafeLoader):
    """YAML as OmegaConf reads it: 1e-6 is a number, too."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\.\d[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(?:inf|Inf|INF))\Z|\.(?:nan|NaN|NAN)\Z"
    ),
    list("-+0123456789."),
)


def load_tree(file: Path) -> Tree:
    """Return the mapping of a YAML file. Raises ConfigError for anything else."""
    try:
        tree = yaml.load(text_of(file), Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{file}{where}: no YAML: {getattr(error, 'problem', None) or 'it cannot be parsed'}"
        ) from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: a {type(tree).__name__} at the top; a configuration is a mapping of keys")
    return tree


def file_beside(file: Path, name: str, endings: tuple[str, ...] = (".yaml", ".yml")) -> Path | None:
    """Return the file that a configuration or script names from the top of its repository; None if it is not to be found."""
    folders = [Path(), *file.resolve().parents[:_PARENTS]]
    return next((folder / name for folder in folders if name.endswith(endings) and (folder / name).is_file()), None)


def read_resolved(dialect: str, file: Path, sections: set[str], remedy: str) -> ForeignRun:
    """Return the run of a configuration that holds all defaults. Raises ConfigError if it lacks one of `sections`."""
    tree = load_tree(file)
    if lacking := sorted(sections - set(tree)):
        raise NotThisDialect(f"{file}: no section {lacking[0]}, which {dialect}'s configurations have; {remedy}")
    return ForeignRun(dialect, file, "", "", settings_of(tree, file.name), complete=True)


def settings_of(tree: Tree, where: str, places: Mapping[str, str] | None = None) -> tuple[ForeignSetting, ...]:
    """Return one setting per leaf, interpolations resolved. Empty mappings and lists are leaves. places: where a key comes
    from, if not from `where`."""
    settings = []
    for key, value in _leaves(tree, ""):
        unknown: list[str] = []
        resolved = _resolved(value, key, tree, unknown, 0)
        place = (places or {}).get(key, where)
        if isinstance(resolved, dict) and isinstance(value, str):
            settings += [
                ForeignSetting(f"{key}.{name}", leaf, place, tuple(unknown)) for name, leaf in _leaves(resolved, "")
            ]
        else:
            settings.append(ForeignSetting(key, resolved, place, tuple(dict.fromkeys(unknown))))
    return last_of_each_key(settings)


def _leaves(tree: Tree, prefix: str) -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves += _leaves(value, f"{prefix}{key}.")
        else:
            leaves.append((f"{prefix}{key}", value))
    return leaves


def _resolved(value: Any, key: str, tree: Tree, unknown: list[str], depth: int) -> Any:
    """Return a value with its interpolations replaced; what only the environment knows stays and is named in `unknown`."""
    if depth > _DEEPEST:
        raise ConfigError(f"{key}: interpolations that name one another; the value has no end")
    if isinstance(value, list):
        return [_resolved(item, key, tree, unknown, depth + 1) for item in value]
    if isinstance(value, dict):
        return {name: _resolved(item, f"{key}.{name}", tree, unknown, depth + 1) for name, item in value.items()}
    if not isinstance(value, str) or "${" not in value:
        return value
    kept: list[str] = []
    text = value
    while match := _LEAF.search(text):
        found = _interpolated(match[1].strip(), key, tree, unknown, depth + 1)
        if match[0] == text and not isinstance(found, _Unresolved):
            return found
        shown = "" if found is None else str(found)
        if "${" in shown:
            kept.append(shown)
            shown = f"\0{len(kept) - 1}\0"
        text = text[: match.start()] + shown + text[match.end() :]
    while "\0" in text:
        text = re.sub("\0(\\d+)\0", lambda mark: kept[int(mark[1])], text)
    return text


class _Unresolved(str):
    """An interpolation that stays as it is."""


def _interpolated(text: str, key: str, tree: Tree, unknown: list[str], depth: int) -> Any:
    name, colon, rest = text.partition(":")
    if not colon:
        path = _path(text, key)
        found, value = _node(path, tree)
        if found:
            return _resolved(value, path, tree, unknown, depth)
    elif name == "oc.env":
        variable, comma, default = rest.partition(",")
        if comma:
            return yaml.load(default, Loader=_Loader) if default.strip() else ""
        unknown.append(variable.strip())
        return _Unresolved(f"${{{variable.strip()}}}")
    elif name == "oc.select":
        node, comma, default = rest.partition(",")
        path = _path(node.strip(), key)
        found, value = _node(path, tree)
        if found:
            return _resolved(value, path, tree, unknown, depth)
        return yaml.load(default, Loader=_Loader) if comma else None
    elif name in _NUMBERS:
        return _computed(name, rest, text, unknown)
    unknown.append(f"${{{text}}}")
    return _Unresolved(f"${{{text}}}")


_NUMBERS: dict[str, Callable[[float, float], float]] = {
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "max": max,
    "min": min,
}
"""NeMo-RL's resolvers of numbers (nemo_rl/utils/config.py)."""


def _computed(name: str, rest: str, text: str, unknown: list[str]) -> Any:
    try:
        a, b = (yaml.load(part, Loader=_Loader) for part in rest.split(","))
        return _NUMBERS[name](a, b)
    except (ValueError, TypeError, ZeroDivisionError, yaml.YAMLError):
        unknown.append(f"${{{text}}}")
        return _Unresolved(f"${{{text}}}")


def _path(path: str, key: str) -> str:
    """Return a path from the top. One that begins with dots is relative to the key's section."""
    dots = len(path) - len(path.lstrip("."))
    return ".".join([*(key.split(".")[:-dots] if dots else []), *filter(None, path[dots:].split("."))])


def _node(path: str, tree: Tree) -> tuple[bool, Any]:
    """Return whether a node is there, and its value."""
    node: Any = tree
    for part in path.split("."):
        if not isinstance(node, dict) or part not in node:
            return False, None
        node = node[part]
    return True, node
