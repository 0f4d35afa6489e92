"""verl's runs: the training command of a bash script with hydra's overrides, or hydra's resolved configuration.

Change here: what counts as verl's training program. Source: verl b178a3c (2026-01-29), verl-recipe 48ea0a7.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dapo_mcore.foreign.bash.values import Value
from dapo_mcore.foreign.read.hydra import override
from dapo_mcore.foreign.read.passes import one_setting_per_key
from dapo_mcore.foreign.read.script import training_start
from dapo_mcore.foreign.read.tree import read_resolved
from dapo_mcore.foreign.settings import ForeignRun, ForeignSetting

_ENTRY = re.compile(r"([\w./-]*[./])?(main_(?!generation|eval|sft)\w+|\w+_main(_ppo)?)(\.py)?")
_REMEDY = (
    "give a script that starts verl's trainer (python3 -m verl.trainer.main_ppo …), or the configuration that hydra has written "
    "beside a run of it (outputs/DATE/TIME/.hydra/config.yaml)"
)
_OWN_OPTIONS = re.compile(r"--?(config-name|config-path|config-dir|cn|cp|cd)(=(.*))?", re.DOTALL)


def read_verl(file: Path) -> ForeignRun:
    """Return a run of verl. A *.yaml file is read as hydra's resolved configuration, any other as a bash script.

    Raises ConfigError for a file that holds neither.
    """
    if file.suffix in (".yaml", ".yml"):
        return read_resolved("verl", file, {"actor_rollout_ref", "algorithm"}, _REMEDY)
    start = training_start(file, entry_place, _REMEDY)
    config, notes = "", list(start.notes)
    passes = []
    for words in start.passes:
        name, settings, found = _overrides(file.name, words)
        config = name or config
        notes += found
        passes.append(settings)
    settings = one_setting_per_key(passes, start.line)
    return ForeignRun("verl", file, module_of(start.entry), config, settings, notes=tuple(dict.fromkeys(notes)))


def entry_place(words: Sequence[str]) -> int | None:
    """Return the place of verl's training program among a command's words: `-m MODULE` or FILE.py after python."""
    for place, word in enumerate(words[1:], 1):
        if _ENTRY.fullmatch(word) and (
            words[place - 1] == "-m" or (word.endswith(".py") and "=" not in words[place - 1])
        ):
            return place
    return None


def module_of(entry: str) -> str:
    """Return `recipe.dapo.main_dapo` for `recipe/dapo/main_dapo.py`."""
    return entry.removesuffix(".py").lstrip("./").replace("/", ".")


def _overrides(name: str, words: Sequence[Value]) -> tuple[str, list[ForeignSetting], list[str]]:
    """Return the configuration's name, the settings of one command, and notes on words that are neither."""
    config, settings, notes = "", [], []
    waiting = ""
    for word in words:
        if waiting:
            config = word.text if waiting in ("config-name", "cn") else config
            waiting = ""
        elif match := _OWN_OPTIONS.fullmatch(word.text):
            waiting = "" if match[2] else match[1]
            config = match[3] if match[2] and match[1] in ("config-name", "cn") else config
        elif setting := override(word.text):
            settings.append(_setting(name, word, *setting))
        elif word.text and word.text != "--":
            notes.append(_no_setting(word))
    return config.strip("'\"").removesuffix(".yaml"), settings, notes


def _setting(name: str, word: Value, key: str, value: object, removed: bool) -> ForeignSetting:
    parsed = [override(other) for other in word.others]
    return ForeignSetting(
        key,
        value,
        f"{name} line {word.line}",
        word.unknown,
        tuple(other[1] for other in parsed if other and other[0] == key),
        word.depends,
        removed,
    )


def _no_setting(word: Value) -> str:
    if word.unknown:
        return f"line {word.line}: {word.text} may hold further settings; write them into a copy of the script"
    return f"line {word.line}: {word.text} is no setting of the form key=value"
