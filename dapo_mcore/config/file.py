"""Configuration files: YAML plus dotted overrides to a validated Config, with errors that name the key and the nearest one.

Change here: how files and overrides are read and how mistakes are explained. What may be set is settings.py; what YAML means
is yaml_text.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from reprlib import Repr
from types import NoneType
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from dapo_mcore.config.allowed import allowed, hint_about
from dapo_mcore.config.foreign_lookup import foreign, misspelt
from dapo_mcore.config.keys import (
    OLD_KEYS,
    is_section,
    is_text,
    keys_of,
    kind_of,
    nearest_keys,
    nearest_section,
    options,
    type_below,
    type_of_items,
)
from dapo_mcore.config.schema import Config
from dapo_mcore.config.values import Section
from dapo_mcore.config.yaml_text import read_yaml
from dapo_mcore.errors import ConfigError, shortened

S = TypeVar("S", bound=Section)

OPEN = "???"
"""Stands for a value that a person must decide, as in OmegaConf. `dapo-mcore import` writes it; no configuration with it is accepted."""
_MOST_BYTES = 2**20
_MOST_MISTAKES = 8
_MOST_KEYS = 16


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the validated configuration of a YAML file with `a.b=c` overrides applied in order; the last one wins.

    A text field takes the override's value as it stands, without YAML's meaning of `#`, `{` or `: `; `null` is null, and
    quotes around the whole value are YAML's. Other values are YAML: `x=1e-6`, `x=true`, `x=[a, b]` mean what they say.
    Raise ConfigError for a file that cannot be read, broken YAML, an unknown key (with the nearest known one) or a broken
    rule.
    """
    return parse_config(_read_tree(Path(path), overrides))


def load_sections(path: str | Path, overrides: Sequence[str], kind: type[S]) -> S:
    """Return the sections of a YAML file that `kind` has as fields, validated; those beside them are not checked.

    Raise ConfigError as load_config does.
    """
    tree = _read_tree(Path(path), overrides)
    return _validated(kind, {key: value for key, value in tree.items() if key in kind.model_fields})


def parse_config(tree: dict[str, Any]) -> Config:
    """Return the validated configuration of a nested mapping. Raise ConfigError naming every bad key."""
    return _validated(Config, tree)


def _read_tree(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    tree = read_yaml(_read(path), str(path), Config)
    if tree is None:
        raise ConfigError(f"{path} is empty; examples are in examples/*.yaml")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, not a {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    if undecided := list(_undecided(tree)):
        raise ConfigError(
            f"still to decide (now {OPEN}): {', '.join(undecided)}; the comment above each in {path} says by what. Set it there or "
            f"as {undecided[0]}=… on the command line"
        )
    return tree


def _undecided(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _undecided(value, f"{prefix}{key}.")
        elif value == OPEN or (isinstance(value, list) and OPEN in value):
            yield f"{prefix}{key}"


def _validated(kind: type[S], tree: dict[str, Any]) -> S:
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        mistakes = [single for item in error.errors() for single in _single(item)]
        told = list(dict.fromkeys(map(_explain, mistakes)))  # pydantic has a mistake for each alternative of a type
        more = [f"and {len(told) - _MOST_MISTAKES} more mistakes"] if len(told) > _MOST_MISTAKES else []
        raise ConfigError("\n".join(told[:_MOST_MISTAKES] + more)) from None


def repeated_overrides(overrides: Sequence[str]) -> list[str]:
    """Return a note for each override that a later one replaces, because it has the same key or one that includes it."""
    keys = [override.partition("=")[0] for override in overrides]
    return [
        f"{shortened(override)} is given, but {shortened(later)} comes after it and replaces it"
        for number, override in enumerate(overrides)
        for later, key in zip(overrides[number + 1 :], keys[number + 1 :])
        if f"{keys[number]}.".startswith(f"{key}.")
    ]


def dump_config(config: Config) -> str:
    """Return the configuration as YAML, with every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def record_config(config: Config, run_dir: Path, step: int = 0) -> Path | None:
    """Write config.yaml of a run that continues after rollout step `step`. Return where the earlier one went if it differs.

    An earlier one that held until step 4 goes to config.step_000004.yaml, or config.step_000004.1.yaml if that exists.
    """
    path, text = run_dir / "config.yaml", dump_config(config)
    kept = None
    if path.exists() and path.read_text(encoding="utf-8") != text:
        kept = next(name for name in _names(run_dir / f"config.step_{step:06d}") if not name.exists())
        path.rename(kept)
    unfinished = run_dir / "config.yaml.tmp"
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
    return kept


def _names(stem: Path) -> Iterator[Path]:
    yield stem.with_name(f"{stem.name}.yaml")
    yield from (stem.with_name(f"{stem.name}.{number}.yaml") for number in count(1))


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"no configuration file at {path}; examples are in examples/*.yaml") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; name the YAML file, for instance {path / 'config.yaml'}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"the configuration file {shortened(str(path))} cannot be read: {reason}") from None
    if len(content) > _MOST_BYTES:
        raise ConfigError(f"{path} has more than {_MOST_BYTES} bytes; is it a configuration? They have a few thousand")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path} line {line} is not UTF-8 (byte {content[error.start]:#04x}); save the file as UTF-8"
        ) from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {shortened(override)!r} is not of the form section.key=value")
    kind: Any = Config
    *parents, leaf = path = key.split(".")
    for depth, parent in enumerate(parents, 1):
        kind = type_below(kind, parent)
        if kind is not None and not _holds_keys(kind):
            raise ConfigError(
                f"override {shortened(override)!r}: {'.'.join(path[:depth])} is a value, not a section, and has no "
                f"{shortened('.'.join(path[depth:]))}"
            )
        if not isinstance(tree.get(parent), dict):
            tree[parent] = {}
        tree = tree[parent]
    tree[leaf] = _value(type_below(kind, leaf), text, shortened(override), tuple(path))


def _holds_keys(kind: Any) -> bool:
    return kind is Any or any(
        is_section(option) or getattr(option, "__origin__", None) is dict for option in options(kind)
    )


def _value(kind: Any, text: str, override: str, path: tuple[str, ...]) -> Any:
    if text == "null":
        return None
    if _is_literal(kind, text) and not _is_quoted(text):
        return text
    return read_yaml(text, f"the value of override {override!r}", kind, path)


def _is_literal(kind: Any, text: str) -> bool:
    """Return True if the value is taken as text: for text fields, a list of texts without brackets, and a non-bool `bool | str`."""
    kinds = set(options(kind)) - {NoneType}
    if kinds == {bool, str}:
        return text.lower() not in ("true", "false", "yes", "no", "on", "off")
    return is_text(kind) or (type_of_items(kind) is not None and not text.lstrip().startswith("["))


def _is_quoted(text: str) -> bool:
    if len(text) < 2 or text[0] not in "'\"" or text[0] != text[-1]:
        return False
    try:
        return isinstance(yaml.safe_load(text), str)
    except yaml.YAMLError:
        return False


def _single(item: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield one mistake per key of an unknown section, unless it is a misspelt section of ours: none of its keys is foreign, and a
    known section has nearly the same name."""
    path, value = _path(item), item["input"]
    if item["type"] == "extra_forbidden" and isinstance(value, dict) and value:
        parts = [
            part for key, below in value.items() for part in _single({**item, "loc": (*path, str(key)), "input": below})
        ]
        if not nearest_section(path) or any(foreign(".".join(_path(part))) for part in parts):
            yield from parts
            return
    yield item


def _explain(item: Mapping[str, Any]) -> str:
    """Return one line for one of pydantic's errors."""
    path = _path(item)
    where = shortened(".".join(path), 100)
    if item["type"] == "missing":
        return f"{where} is missing; it has no default"
    if item["type"] == "extra_forbidden" and (new := OLD_KEYS.get(".".join(path))):
        section, _, key = new.rpartition(".")
        return f"{where} is now {new}: set {key} in the section {section} and delete the old key"
    if item["type"] == "extra_forbidden" and (found := foreign(".".join(path))):
        return f"unknown key {where!r}: this is {found}"
    if item["type"] == "extra_forbidden":
        near = nearest_section(path) if isinstance(item["input"], dict) else nearest_keys(path)
        value = hint_about(near[0].split("."), item["input"]) if near else ""
        return f"unknown key {where!r}; {_did_you_mean(near, path)}{value}"
    if item["type"] in ("model_type", "dict_type") and where:
        return f"{where} is a section, not a value (got {_shown(item['input'])}); {_how_to_set(path)}"
    key, words = allowed(path)
    where = shortened(".".join(key), 100)
    if item["type"] != "value_error" and words:
        return f"{where} is {_shown(item['input'])}; set {words}{hint_about(key, item['input'])}"
    message = item["msg"].removeprefix("Value error, ")
    broken_section = item["type"] == "value_error" and isinstance(item["input"], dict)  # its message has the numbers
    got = "" if broken_section else f" (got {_shown(item['input'])})"
    return f"{where}: {message}{got}" if where else message


def _path(item: Mapping[str, Any]) -> list[str]:
    return [str(part) for part in item["loc"] if part != "[key]"]


def _did_you_mean(near: Sequence[str], path: Sequence[str]) -> str:
    """Return a hint: the nearest keys, else the nearest foreign one, else the keys of the section, else how to print all keys."""
    if near:
        return f"did you mean {' or '.join(map(repr, near[:3]))}?"
    if meant := misspelt(".".join(path)):
        return f"did you mean {meant}?"
    section = path[:-1]
    if section and (keys := keys_of(section)):
        return f"the keys of {'.'.join(section)} are {_listed(keys)}"
    return "`dapo-mcore config --only-values examples/quickstart.yaml` prints all keys"


def _how_to_set(section: Sequence[str]) -> str:
    off = ", or null to turn it off" if NoneType in options(kind_of(section)) else ""
    if keys := keys_of(section):
        return f"set its keys ({_listed(keys)}) as {'.'.join(section)}.{keys[0]}=…{off}"
    return f"set names in it as {'.'.join(section)}.NAME=…, or {{}} for none{off}"


def _listed(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _MOST_KEYS} more" if len(keys) > _MOST_KEYS else ""
    return ", ".join(keys[:_MOST_KEYS]) + more


def _shown(value: Any) -> str:
    """Return the value's repr, shortened; null, true and false as in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    short = Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    short.maxlevel = 2
    try:
        return short.repr(value)
    except ValueError:  # an integer of thousands of digits
        return f"a huge {type(value).__name__}"
