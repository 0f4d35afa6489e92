"""Configuration files: YAML plus dotted overrides to a validated Config, with errors that name the key and the nearest one.

Change here: how files and overrides are read and how mistakes are explained. What may be set is config.py.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dapo_mcore.config import Config
from dapo_mcore.errors import ConfigError


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The validated configuration of a YAML file with `a.b=c` overrides applied in order.

    Values of overrides are parsed as YAML, so `x=1e-6`, `x=true`, `x=[a, b]` and `x=null` mean what they say.
    Raises ConfigError for a missing file, broken YAML, an unknown key (with the nearest known one) or a broken rule.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no configuration file at {path}; examples are in examples/*.yaml")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, not a {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree)


def parse_config(tree: dict[str, Any]) -> Config:
    """The validated configuration of a nested mapping. Raises ConfigError naming every bad key."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item) for item in error.errors())) from None


def dump_config(config: Config) -> str:
    """The configuration as YAML with every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def record_config(config: Config, run_dir: Path, step: int = 0) -> Path | None:
    """Writes config.yaml of a run that goes on after rollout step `step`; where the one before went, if it differs.

    That is config.step_000004.yaml for one that held until step 4 (config.step_000004.1.yaml where there is one, …).
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


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-6` as text; YAML 1.2, and everybody who trains models, reads a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of override {override!r} is not valid YAML: {error}") from error
    *parents, leaf = key.split(".")
    for parent in parents:
        if not isinstance(tree.get(parent), dict):
            tree[parent] = {}
        tree = tree[parent]
    tree[leaf] = value


def _explain(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] != "extra_forbidden":
        message = item["msg"].removeprefix("Value error, ")
        broken_section = item["type"] == "value_error" and isinstance(
            item["input"], dict
        )  # its message has the numbers
        got = "" if broken_section else f" (got {item['input']!r})"
        return f"{where}: {message}{got}" if where else message
    near = difflib.get_close_matches(str(item["loc"][-1]), _known_keys(item["loc"][:-1]), n=1, cutoff=0.4)
    hint = f"; did you mean {'.'.join([*map(str, item['loc'][:-1]), near[0]])!r}?" if near else ""
    return f"unknown key {where!r}{hint}"


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """Field names of the section at `location`, found by walking the annotations."""
    section: Any = Config
    for part in location:
        field = getattr(section, "model_fields", {}).get(part)
        if field is None:
            continue  # a key of a mapping, such as a set's name in eval.sets
        section = _section_of(field.annotation)
    return list(getattr(section, "model_fields", {}))


def _section_of(annotation: Any) -> Any:
    """The Section inside `X`, `X | None` or `dict[str, X]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in getattr(annotation, "__args__", ()) if (found := _section_of(arg))), None)
