"""NeMo-RL's runs: a YAML file with the files that its `defaults` name, or a script that starts an example with overrides.

Change here: how NeMo-RL's files inherit. Source: NeMo-RL 7ea279a (2026-08-22), nemo_rl/utils/config.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dapo_mcore.errors import ConfigError
from dapo_mcore.foreign.bash.values import Value
from dapo_mcore.foreign.read.hydra import override
from dapo_mcore.foreign.read.script import training_start
from dapo_mcore.foreign.read.tree import Tree, file_beside, load_tree, settings_of
from dapo_mcore.foreign.settings import ForeignRun

BASE = "grpo_math_1B.yaml"
"""NeMo-RL's own file of defaults (examples/configs). What only it sets is no setting of the run: the table holds it, with its version."""
_ENTRY = re.compile(r"(.*/)?run_grpo\w*\.py")
_REMEDY = (
    "give NeMo-RL's YAML file (examples/configs/….yaml), or a script that starts examples/run_grpo.py --config FILE"
)
_SECTIONS = ("grpo", "policy")
_DEEPEST = 20
_LONGEST_TEXT = 100_000


def read_nemo(file: Path) -> ForeignRun:
    """Return a run of NeMo-RL. The files of its `defaults` are read if they are there; else the table's defaults hold.

    Raises ConfigError for a file that is neither, and for `defaults` that lead in a circle.
    """
    if file.suffix in (".yaml", ".yml"):
        return _composed(file, file, [], [])
    start = training_start(file, _entry_place, _REMEDY)
    words = start.passes[0]
    name = _config_name(words)
    found = file_beside(file, name.text) if name else None
    if found is None:
        shown = name.text if name else "no --config"
        raise ConfigError(
            f"{file} line {start.line}: {shown}: that configuration is not beside the script; import the YAML file itself"
        )
    return _composed(file, found, list(words), list(start.notes))


def _entry_place(words: Sequence[str]) -> int | None:
    return next((place for place, word in enumerate(words) if place and _ENTRY.fullmatch(word)), None)


def _config_name(words: Sequence[Value]) -> Value | None:
    for place, word in enumerate(words):
        if word.text.startswith("--config="):
            return Value(word.text.partition("=")[2], word.line, word.unknown)
        if word.text == "--config" and place + 1 < len(words):
            return words[place + 1]
    return None


def text_beside(file: Path, name: str) -> str | None:
    """Return the text of a .txt file that a configuration names from the top of its repository; None if it is not to be found."""
    found = file_beside(file, name, (".txt",))
    try:
        return found.read_text(encoding="utf-8") if found and found.stat().st_size <= _LONGEST_TEXT else None
    except (OSError, UnicodeDecodeError):
        return None


def _composed(file: Path, config: Path, words: list[Value], notes: list[str]) -> ForeignRun:
    places: dict[str, str] = {}
    seen: set[str] = set()
    tree = _inherited(config, places, notes, 0, seen)
    unknown: dict[str, tuple[str, ...]] = {}
    for word in words:
        found = override(word.text)
        if found and not found[2]:
            _set(tree, found[0], found[1])
            places[found[0]] = f"{file.name} line {word.line}"
            unknown[found[0]] = word.unknown
    if lacking := [section for section in _SECTIONS if section not in tree]:
        raise ConfigError(f"{config}: no section {lacking[0]}, which NeMo-RL's GRPO configurations have; {_REMEDY}")
    settings = [
        replace(setting, unknown=unknown.get(setting.key) or setting.unknown)
        for setting in settings_of(tree, BASE, places)
        if setting.where != BASE
    ]
    base = BASE if BASE in seen else ""
    return ForeignRun("nemo", file, "", base, tuple(settings), notes=tuple(dict.fromkeys(notes)))


def _inherited(file: Path, places: dict[str, str], notes: list[str], depth: int, seen: set[str]) -> Tree:
    """Return a file's tree on top of those of its `defaults`. `places` gets the file of each leaf, `seen` BASE if it is among them,
    or may be: below a file that is not there."""
    if depth > _DEEPEST:
        raise ConfigError(f"{file}: its defaults lead in a circle, or {_DEEPEST} files deep")
    own = load_tree(file)
    seen.add(file.name)
    named = own.pop("defaults", [])
    tree: Tree = {}
    for name in [named] if isinstance(named, str) else named or []:
        parent = file.parent / str(name)
        if parent.is_file():
            _merge(tree, _inherited(parent, places, notes, depth + 1, seen))
        else:
            seen.add(BASE)
            notes.append(
                f"{file.name}: its defaults name {name}, which is not there: NeMo-RL's own defaults hold instead"
            )
    _merge(tree, own)
    if file.name != BASE:
        places.update(dict.fromkeys(_keys(own, ""), file.name))
    return tree


def _merge(tree: Tree, over: Tree) -> None:
    """Merge in place as NeMo-RL does: mappings key by key, unless the upper one says `_override_`; all else replaces."""
    for key, value in over.items():
        if isinstance(value, dict):
            value = dict(value)
            replaces = value.pop("_override_", False)
            held = tree.get(key)
            if isinstance(held, dict) and not replaces:
                _merge(held, value)
                continue
        tree[key] = value


def _keys(tree: Tree, prefix: str) -> list[str]:
    keys: list[str] = []
    for key, value in tree.items():
        keys += _keys(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [f"{prefix}{key}"]
    return keys


def _set(tree: Tree, key: str, value: Any) -> None:
    *parents, name = key.split(".")
    for part in parents:
        held = tree.get(part)
        tree[part] = held if isinstance(held, dict) else {}
        tree = tree[part]
    tree[name] = value
