"""verl's runs: the training command of a bash script with hydra's overrides, or hydra's resolved configuration.

Change here: what counts as verl's training program. Source: verl b178a3c (2026-01-29), verl-recipe 48ea0a7.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dapo_mcore.foreign.bash.values import Value
from dapo_mcore.foreign.read.hydra import override
from dapo_mcore.foreign.read.passes import one_setting_per_key
from dapo_mcore.foreign.read.script import training_start
from dapo_mcore.foreign.read.tree import load_tree, read_resolved, settings_of
from dapo_mcore.foreign.settings import ForeignRun, ForeignSetting, last_of_each_key

_ENTRY = re.compile(r"([\w./-]*[./])?(main_(?!generation|eval|sft)\w+|\w+_main(_ppo)?)(\.py)?")
_REMEDY = (
    "give a script that starts verl's trainer (python3 -m verl.trainer.main_ppo …), or the configuration that hydra has written "
    "beside a run of it (outputs/DATE/TIME/.hydra/config.yaml)"
)
_KNOWN_CONFIG = re.compile(
    r"((one_step_off|fully_async|transfer_queue)_)?(ppo|dapo)(_megatron)?_trainer|dapo_transfer_queue_trainer"
)
"""Names of configurations of verl and its recipes, whose defaults the table holds."""
_LONG_OPTIONS = {"cn": "config-name", "cp": "config-path", "cd": "config-dir"}
_OWN_OPTIONS = re.compile(r"--?(config-name|config-path|config-dir|cn|cp|cd)(=(.*))?", re.DOTALL)


def read_verl(file: Path) -> ForeignRun:
    """Return a run of verl. A *.yaml file is read as hydra's resolved configuration, any other as a bash script.

    Raises ConfigError for a file that holds neither.
    """
    if file.suffix in (".yaml", ".yml"):
        return read_resolved("verl", file, {"actor_rollout_ref", "algorithm"}, _REMEDY)
    start = training_start(file, entry_place, _REMEDY)
    config, below, notes = "", list[ForeignSetting](), list(start.notes)
    passes = []
    for words in start.passes:
        name, folder, settings, found = _overrides(file.name, words)
        if name.text:
            config, below, told = _configuration(file, name, folder)
            notes += told
        notes += found
        passes.append(settings)
    settings = last_of_each_key([*below, *one_setting_per_key(passes, start.line)])
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


def _configuration(file: Path, name: Value, folder: str) -> tuple[str, list[ForeignSetting], list[str]]:
    """Return the configuration of verl that the run's own one begins with, the settings of the own one, and where it is.

    One that is neither beside the script nor in a folder above it becomes the setting `config-name`, which the table takes for a
    loss.
    """
    if _KNOWN_CONFIG.fullmatch(name.text) and not name.unknown and not name.others:
        return name.text, [], []
    found = None if name.unknown or name.others else _own_file(file, name.text, folder)
    if found:
        tree = load_tree(found)
        named, _ = tree.pop("defaults", []), tree.pop("hydra", None)
        bases = [base for base in (named if isinstance(named, list) else [named]) if base != "_self_"]
        if len(bases) <= 1 and all(isinstance(base, str) and _KNOWN_CONFIG.fullmatch(base) for base in bases):
            return (bases or [""])[0], list(settings_of(tree, found.name)), [f"--config-name {name.text} is {found}"]
    unread = ForeignSetting("config-name", name.text, f"{file.name} line {name.line}", name.unknown)
    return name.text, [unread], []


def _own_file(file: Path, name: str, folder: str) -> Path | None:
    """Return NAME.yaml in the folder of `--config-path`, looked for from the script's folder upwards: scripts are started in a folder
    above them, and name it as $PWD or $(pwd). Beside the script the last part of the folder counts, and the script's own folder."""
    known = folder.rpartition("}")[2].rpartition(")")[2].strip("/")
    places = [file.parent / part for part in (known.rpartition("/")[2], "")]
    if known and not folder.startswith(("/", "~")):
        places = [above / known for above in file.absolute().parents] + places
    return next((path for place in places if (path := place / f"{name}.yaml").is_file()), None)


def _overrides(name: str, words: Sequence[Value]) -> tuple[Value, str, list[ForeignSetting], list[str]]:
    """Return the configuration's name and folder, the settings of one command, and notes on words that are neither."""
    options: dict[str, Value] = {}
    settings, notes = [], []
    waiting = ""
    for word in words:
        if waiting:
            options[waiting] = word
            waiting = ""
        elif match := _OWN_OPTIONS.fullmatch(word.text):
            option = _LONG_OPTIONS.get(match[1], match[1])
            waiting = "" if match[2] else option
            if match[2]:
                options[option] = replace(word, text=match[3])
        elif setting := override(word.text):
            settings.append(_setting(name, word, *setting))
        elif word.text and word.text != "--":
            notes.append(_no_setting(word))
    config, folder = options.get("config-name"), options.get("config-path", options.get("config-dir"))
    config = replace(config, text=_plain(config).removesuffix(".yaml")) if config else Value("", 0)
    return config, _plain(folder) if folder else "config", settings, notes


def _plain(word: Value) -> str:
    return word.text.strip("'\"")


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
