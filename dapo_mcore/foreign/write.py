"""The YAML of an imported run: what differs from our defaults, each line with what it comes from.

Change here: how a value, its comment and an open decision are written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import yaml

from dapo_mcore.config.file import OPEN
from dapo_mcore.config.foreign_names import TITLES
from dapo_mcore.config.keys import is_prose, kind_of
from dapo_mcore.config.schema import Config
from dapo_mcore.foreign.convert import Conversion
from dapo_mcore.foreign.settings import ForeignSetting
from dapo_mcore.foreign.table import Outcome

_WIDTH = 150
_COMMENTS_AT = 44


def run_yaml(conversion: Conversion) -> str:
    """Return the configuration as YAML text. Keys that a person must decide are `???`, with what to decide by above them."""
    values: dict[str, tuple[Any, str]] = {}
    for ours, (value, sources) in conversion.values().items():
        if value != default_of(ours) or ours in _ALWAYS:
            values[ours] = (value, _comment(conversion, sources))
    asked = {ours: (OPEN, outcome.note) for ours, outcome in conversion.asked.items()}
    tree = _tree({**values, **asked})
    return "\n".join([*_head(conversion), "", *_lines(tree, "", "")]) + "\n"


_ALWAYS = ("name",)


def default_of(ours: str) -> Any:
    """Return our default of a dotted key; None for a key without one."""
    *parents, name = ours.split(".")
    if parents[:2] == ["eval", "sets"]:
        return _set_defaults().get(name)
    tree: Any = _defaults()
    for part in (*parents, name):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


@cache
def _defaults() -> dict[str, Any]:
    config = Config.model_validate({"model": {"path": "-"}, "data": {"files": ["-"]}})
    tree = config.model_dump(mode="json")
    tree["model"]["path"] = tree["data"]["files"] = None
    return tree


@cache
def _set_defaults() -> dict[str, Any]:
    config = Config.model_validate(
        {"model": {"path": "-"}, "data": {"files": ["-"]}, "eval": {"sets": {"a": {"files": ["-"]}}}}
    )
    return config.model_dump(mode="json")["eval"]["sets"]["a"] | {"files": None}


def _head(conversion: Conversion) -> Iterator[str]:
    run, table = conversion.run, conversion.table
    yield f"# {run.file.name} in the words of dapo_mcore, by `dapo-mcore import {table.dialect}`. What is not here is our default."
    if conversion.asked:
        where = "To decide before it starts, in this file or as KEY=VALUE on the command line"
        yield from _wrapped("# ", f"{where}: {', '.join(conversion.asked)}.")
    if lost := list(conversion.losses):
        yield from _wrapped("# ", f"Lost: {', '.join(lost)}.")


def _comment(conversion: Conversion, sources: Sequence[Outcome]) -> str:
    """Return what a value comes from: `trainer.test_freq=5 (line 41), rollout steps`."""
    parts, notes = [], []
    for outcome in sources:
        places = conversion.places(outcome)
        parts += [_setting(setting) for setting in places]
        if not places:
            parts.append(
                f"{TITLES[conversion.table.dialect]}'s default"
                if outcome.sources != (conversion.run.entry,)
                else outcome.sources[0]
            )
        notes.append(outcome.note)
    text = ", ".join(dict.fromkeys(parts))
    told = "; ".join(dict.fromkeys(filter(None, notes)))
    return f"{text}: {told}" if told else text


def _setting(setting: ForeignSetting) -> str:
    number = line_number(setting)
    return f"{setting.key}={shown(setting.value)}" + (f" (line {number})" if number else "")


def line_number(setting: ForeignSetting) -> str:
    """Return the number of a setting's line in a script; "" for a configuration."""
    return setting.where.partition(" line ")[2].partition(" ")[0]


def shown(value: Any) -> str:
    """Return a value for a comment or the report, shortened."""
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 60 else f"{text[:57]}…"


def _tree(values: dict[str, tuple[Any, str]]) -> dict[str, Any]:
    """Return nested mappings with (value, comment) at the ends, in the order of our configuration."""
    order = {key: place for place, key in enumerate(Config.model_fields)}
    tree: dict[str, Any] = {}
    for ours in sorted(values, key=lambda key: order.get(key.split(".")[0], 0)):
        *parents, name = ours.split(".")
        below = tree
        for part in parents:
            below = below.setdefault(part, {})
        below[name] = (ours, *values[ours])
    return tree


def _lines(tree: dict[str, Any], indent: str, path: str) -> Iterator[str]:
    for name, below in tree.items():
        if isinstance(below, dict):
            if not indent:
                yield ""
            yield f"{indent}{name}:"
            yield from _lines(below, f"{indent}  ", f"{path}{name}.")
            continue
        ours, value, comment = below
        line = f"{indent}{name}: {_value(ours, value)}"
        if value == OPEN:
            yield from _wrapped(f"{indent}# decide: ", comment)
            yield line
        elif max(len(line) + 2, _COMMENTS_AT) + len(comment) + 2 <= _WIDTH:
            yield f"{line:<{_COMMENTS_AT - 2}}  # {comment}"
        else:
            yield from _wrapped(f"{indent}# ", comment)
            yield line


def _wrapped(start: str, text: str) -> Iterator[str]:
    line = start
    for word in text.split():
        if len(line) + len(word) > _WIDTH - 20 and line != start:
            yield line.rstrip()
            line = start[: start.index("#") + 1] + " "
        line += f"{word} "
    yield line.rstrip()


def _value(ours: str, value: Any) -> str:
    """Return a value on one line of YAML. Prose is quoted, for a `#` after it would be taken for a part of it."""
    kind = kind_of(ours.split("."))
    if isinstance(value, str) and kind is not None and is_prose(kind):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        return _number(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)
    return text.removesuffix("...\n").strip()


def _number(value: float) -> str:
    """Return 1e-6 and 0.28 as people write them."""
    mantissa, exponent, power = repr(value).partition("e")
    return f"{mantissa}e{int(power)}" if exponent else mantissa
