"""Where a dotted key leads in the configuration's sections: the type of its value, and which key was meant by a wrong one.

Change here: how a key is looked up, and what counts as near.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from dapo_mcore.config.foreign_lookup import meant_by
from dapo_mcore.config.schema import Config
from dapo_mcore.config.values import Prose, Section

_NEAR = 0.85
_NEAR_IN_SECTION = 0.7
_NEAR_SECTION = 0.6
_LONGEST_KEY = 64
_SAY_LITTLE = frozenset({"enable", "mode", "name", "path", "type"})
"""Names that mean something different in every section."""
OLD_KEYS = {"rollout.sglang.ray_address": "ray.address"}
"""Each key that has been renamed or moved, with its new name."""


def type_below(kind: Any, key: str) -> Any:
    """Return the type of the value under `key` in a value of type `kind`: Any in a free mapping, None for an unknown key. The
    key of an item of a list is its number."""
    for option in options(kind):
        if is_section(option):
            return _fields(option).get(key)
        if get_origin(option) is dict:
            return get_args(option)[1]
        if get_origin(option) is list and key.isdecimal():
            return get_args(option)[0]
        if option is Any:
            return Any
    return None


def type_of_items(kind: Any) -> Any:
    """Return the type of an item of a list; None if `kind` is not a list."""
    return next((get_args(option)[0] for option in options(kind) if get_origin(option) is list), None)


def options(kind: Any) -> list[Any]:
    """Return the alternatives of a type: `Annotated[str, …] | None` gives [str, NoneType]."""
    origin = get_origin(kind)
    if origin is Annotated:
        return options(get_args(kind)[0])
    if origin in (Union, UnionType):
        return [option for part in get_args(kind) for option in options(part)]
    return [kind]


def is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def is_text(kind: Any) -> bool:
    """Return True for a type whose values are text, including a choice of words, or null."""
    kinds = [option for option in options(kind) if option is not NoneType]
    return bool(kinds) and all(option is str or get_origin(option) is Literal for option in kinds)


def is_prose(kind: Any) -> bool:
    """Return True for a type marked as text for people or models (values.Prose)."""
    if get_origin(kind) is Annotated:
        inner, *marks = get_args(kind)
        return Prose in marks or is_prose(inner)
    return any(is_prose(part) for part in get_args(kind))


def nearest_keys(path: Sequence[str]) -> list[str]:
    """Return the dotted keys that an unknown key may stand for. Equally good ones are all returned.

    A key with the same last name wins, wherever it is; `kl_coef` finds `algo.kl.coef`, too. Then a name like it in the same
    section wins over one in another, which must be a slip of one letter or share two words. Keys of the critic, which repeat
    those of the policy's optimizer, are for paths that name the critic.
    """
    *parents, name = path
    if len(name) > _LONGEST_KEY:
        return []
    if same := [key for key in _all_keys() if name in _forms(key)]:
        same = [key for key in same if key.startswith("critic.") == ("critic" in parents)] or same
        beside = [key for key in same if parents and key.split(".")[-2:-1] == parents[-1:]]
        return beside or ([] if name in _SAY_LITTLE else same)
    if name not in _SAY_LITTLE and (foreign := meant_by(name)):
        return foreign
    here = _most_alike(name, keys_of(parents), _NEAR_IN_SECTION, 1)
    return [".".join([*parents, key]) for key in here] or _most_alike(name, _all_keys(), _NEAR, 2)


def nearest_section(path: Sequence[str]) -> list[str]:
    """Return the key beside an unknown section that it may have meant; [] if none has a similar name."""
    *parents, name = path
    if len(name) > _LONGEST_KEY:
        return []
    near = difflib.get_close_matches(name, keys_of(parents), n=1, cutoff=_NEAR_SECTION)
    return [".".join([*parents, key]) for key in near]


def kind_of(path: Sequence[str]) -> Any:
    """Return the type of the value at a dotted key, Any in a free mapping, None for an unknown key."""
    kind: Any = Config
    for part in path:
        kind = type_below(kind, part)
    return kind


def keys_of(path: Sequence[str]) -> list[str]:
    """Return the names in a section; [] if there is no such section, or if its names are free."""
    return [key for option in options(kind_of(path)) if is_section(option) for key in _fields(option)]


def _most_alike(name: str, keys: Sequence[str], cutoff: float, num_words: int) -> list[str]:
    near = [(key, form) for key in keys for form in _forms(key) if _is_near(name, form, cutoff, num_words)]
    best = max((_likeness(name, form) for _, form in near), default=0.0)
    return [key for key, form in near if _likeness(name, form) == best]


def _is_near(name: str, form: str, cutoff: float, num_words: int) -> bool:
    """Return True for names with nearly the same letters, or with so many words in common that these are at least half."""
    words, others = set(name.split("_")), set(form.split("_"))
    shared = len(words & others)
    return num_words <= shared >= len(words | others) / 2 or _likeness(name, form) >= cutoff


def _likeness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def _forms(key: str) -> list[str]:
    """Return the ways in which people write the end of a key: coef and kl_coef for `algo.kl.coef`."""
    parts = key.split(".")
    return ["_".join(parts[-count:]) for count in (1, 2) if count <= len(parts)]


@cache
def _fields(section: type[Section]) -> dict[str, Any]:
    hints = get_type_hints(section, include_extras=True)
    return {name: hints[name] for name in section.model_fields}


@cache
def _all_keys() -> tuple[str, ...]:
    """Every dotted key, without those of named sets and of the warm start's own prompts, which repeat those of `data`."""
    return tuple(key for key in _walk(Config, "") if not key.startswith("warm_start.choose."))


def _walk(section: type[Section], prefix: str) -> Iterator[str]:
    for name, kind in _fields(section).items():
        yield prefix + name
        for option in filter(is_section, options(kind)):
            yield from _walk(option, f"{prefix}{name}.")
