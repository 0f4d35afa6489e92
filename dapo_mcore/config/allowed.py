"""What a key may be set to, in words, from the types and bounds of its field: `a finite number that is above 0 and at most 1440, or null`.

Change here: the words. A new field needs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from dapo_mcore.config.schema import Config
from dapo_mcore.errors import listed

_KINDS = {
    "boolean": "true or false", "null": "null", "integer": "a whole number", "number": "a finite number", "string": "text",
    "array": "a list", "object": "a section",
}  # fmt: skip
_BOUNDS = {
    "minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below",
    "minLength": "at least", "maxLength": "at most", "minItems": "at least", "maxItems": "at most",
}  # fmt: skip


_OF_OTHERS = {
    "algo.advantage": {"grpo": "group", "dr_grpo": "group with advantage_std none", "ppo": "gae",
                       "rloo": "group with advantage_baseline leave-one-out and advantage_std none"},
    "algo.kl.estimator": {"kl": "k1", "mse": "k2", "low_var_kl": "k3"},
    "algo.policy_loss": {"vanilla": "clip"},
}  # fmt: skip
"""Values of verl's that mean one of ours."""


class Allowed(NamedTuple):
    """A key, and what it may be set to; None where anything may."""

    key: list[str]
    words: str | None


def allowed(path: Sequence[str]) -> Allowed:
    """Return what may be set at the longest part of the path that is a key. The rest names an alternative of its type."""
    found = _schema()
    for depth, part in enumerate(path):
        below = [kind for option in _options(found) if (kind := _below(option, part)) is not None]
        if not below:
            return Allowed(list(path[:depth]), _words(found))
        found = below[0]
    return Allowed(list(path), _words(found))


def hint_about(key: Sequence[str], value: Any) -> str:
    """Return what a wrong value of a key may have meant, to be put behind what is allowed; "" if nothing is known."""
    if isinstance(value, str) and (ours := _OF_OTHERS.get(".".join(key), {}).get(value)):
        return f" ({value} is {ours} here)"
    if isinstance(value, float) and 0 < value < 1 and key[-1].startswith(("warmup_", "decay_")):
        return f"; for {value:g} of the run, multiply it by the run's length in this unit"
    return ""


@cache
def _schema() -> dict[str, Any]:
    return Config.model_json_schema()


def _options(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the alternatives of a type, without references."""
    if "$ref" in schema:
        yield from _options(_schema()["$defs"][schema["$ref"].rpartition("/")[2]])
    elif "anyOf" in schema:
        for option in schema["anyOf"]:
            yield from _options(option)
    else:
        yield schema


def _below(schema: Mapping[str, Any], part: str) -> Mapping[str, Any] | None:
    """Return the type of what lies under a name or a number in a value; None for nothing, {} for anything."""
    if part in schema.get("properties", ()):
        return schema["properties"][part]
    below = schema.get("items" if part.isdecimal() else "additionalProperties")
    return below if isinstance(below, dict) else {} if below is True else None


def _words(schema: Mapping[str, Any]) -> str | None:
    told = [_word(option) for option in _options(schema)]
    return None if None in told else ", or ".join(told)


def _word(option: Mapping[str, Any]) -> str | None:
    if values := option.get("enum", [option["const"]] if "const" in option else []):
        return listed(values)
    if (kind := option.get("type")) is None:
        return None
    bounds = " and ".join(f"{words} {_number(option[name])}" for name, words in _BOUNDS.items() if name in option)
    length = "whose length is" if kind in ("string", "array") else "that is"
    items = f", each item {_words(option['items'])}" if kind == "array" else ""
    return _KINDS[kind] + (f" {length} {bounds}" if bounds else "") + items


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)
