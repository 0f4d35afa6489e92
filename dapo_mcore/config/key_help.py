"""What the keys of the configuration mean: `dapo-mcore keys WORD`.

Change here: which keys a word finds, and how they are shown. The texts stand below the keys in the other files of this folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic.fields import FieldInfo

from dapo_mcore.config.data import DataConfig
from dapo_mcore.config.foreign_lookup import ending, foreign, misspelt
from dapo_mcore.config.keys import is_section, nearest_keys, options
from dapo_mcore.config.schema import Config
from dapo_mcore.config.values import Section
from dapo_mcore.errors import ConfigError


class Key(NamedTuple):
    """A key with its default, its allowed words, if it is for some, and its text; a section has no default."""

    name: str
    default: str
    words: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        """Return the key as in YAML, with the text indented below."""
        words = f"    # {' | '.join(self.words)}" if self.words else ""
        return "\n    ".join([f"{self.name}: {self.default}{words}".rstrip(), *self.text.splitlines()])


def describe_keys(words: Sequence[str]) -> str:
    """Return what the keys mean that have a word in their names, or are another framework's names for one. A word that no name has is
    looked for in the texts. Without words: all keys. Raise ConfigError for a word that is found nowhere."""
    keys = list(_keys(Config, ""))
    found = [_found(word, keys) for word in words] if words else [(keys, "")]
    named = {key.name: key for chosen, _ in found for key in chosen}
    return "\n\n".join([*filter(None, (note for _, note in found)), *map(str, named.values())])


def _found(word: str, keys: Sequence[Key]) -> tuple[list[Key], str]:
    """Return the keys that the word finds, and what to say of it. Names of ours come first, then foreign ones, then texts."""
    plain = word.partition("=")[0].strip()
    if chosen := [key for key in keys if _has(key.name, plain)]:
        return chosen, ""
    if others := [found] if (found := foreign(plain)) else ending(plain):
        ours = {name for other in others for name in other.name.keys}
        return [key for key in keys if key.name in ours], "\n".join(f"{plain} is {other}" for other in others)
    if chosen := [key for key in keys if _bare(plain) in _bare(key.text)]:
        return chosen, ""
    near = misspelt(plain) or " or ".join(nearest_keys(plain.split(".")))
    hint = f"did you mean {near}?" if near else "`dapo-mcore keys` prints all"
    raise ConfigError(f"no key has {word!r} in its name or its text; {hint}")


def _bare(text: str) -> str:
    """Return the text so that `clip-higher`, `Clip higher` and `clip_higher` are the same."""
    return re.sub(r"[\s_-]+", "", text.lower())


def _has(name: str, word: str) -> bool:
    """Return True if a part of the key has the word in it; a word with dots must be whole parts."""
    return f".{word}." in f".{name}." if "." in word else _bare(word) in _bare(name)


def _keys(section: type[Section], prefix: str) -> Iterator[Key]:
    """Yield the keys of a section and of those below. NAME stands for the name of a set, N for the number of a tool."""
    for name, field in section.model_fields.items():
        if _repeats_data(section, prefix, name):
            continue
        inner, suffix = _sections(field.annotation)
        if inner is None or suffix:
            yield _key(prefix + name, field)
        if inner is not None:
            yield from _keys(inner, f"{prefix}{name}{suffix}.")


def _repeats_data(section: type[Section], prefix: str, name: str) -> bool:
    """Return True for the keys of `data` in another section of prompts, which takes them as they are."""
    declares = section is not DataConfig and name in section.__annotations__
    return issubclass(section, DataConfig) and prefix != "data." and not declares


def _sections(kind: Any) -> tuple[type[Section] | None, str]:
    """Return the section that a value of this type holds, and what stands between its key and the section's keys."""
    for option in options(kind):
        if is_section(option):
            return option, ""
        suffix = {dict: ".NAME", list: ".N"}.get(get_origin(option))
        if suffix and is_section(get_args(option)[-1]):
            return get_args(option)[-1], suffix
    return None, ""


def _key(name: str, field: FieldInfo) -> Key:
    default = "(needed)" if field.is_required() else json.dumps(_plain(field), ensure_ascii=False)
    kinds = [option for option in options(field.annotation) if option is not NoneType]
    words = get_args(kinds[0]) if len(kinds) == 1 and get_origin(kinds[0]) is Literal else ()
    return Key(name, default, tuple(map(str, words)), field.description or "")


def _plain(field: FieldInfo) -> Any:
    value = field.get_default(call_default_factory=True)
    return value.model_dump(mode="json") if isinstance(value, Section) else value
