"""slime's runs: the flags of train.py or train_async.py in a bash script, with those of scripts/models/*.sh that it sources.

Change here: how slime's flags are read. Source: slime 624b824 (2026-08-21), slime/utils/arguments.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dapo_mcore.foreign.bash.values import Value
from dapo_mcore.foreign.read.hydra import plain
from dapo_mcore.foreign.read.passes import one_setting_per_key
from dapo_mcore.foreign.read.script import training_start
from dapo_mcore.foreign.read.tree import file_beside, load_tree
from dapo_mcore.foreign.settings import ForeignRun, ForeignSetting, last_of_each_key

_ENTRIES = frozenset({"train.py", "train_async.py"})
_REMEDY = "give a script that starts slime's trainer (python3 train.py --rollout-batch-size …)"
_JSON = frozenset({"apply-chat-template-kwargs", "train-env-vars", "multimodal-keys"})
_LISTS = frozenset(
    [
        "eval-prompt-data",
        "rollout-stop",
        "rollout-stop-token-ids",
        "rollout-external-engine-addrs",
        "sglang-cuda-graph-bs",
    ]
)
_OPPOSITES = {"no-offload-train": "offload-train", "no-offload-rollout": "offload-rollout"}
_FURTHER = "custom-config-path"
_ELSEWHERE = {
    _FURTHER: "further arguments are in that file, which is not beside the script; give them as flags",
    "eval-config": "its evaluation sets are not read; write them below eval.sets",
    "megatron-config-path": "its fields are not read; write them below megatron",
}


def read_slime(file: Path) -> ForeignRun:
    """Return a run of slime from its bash script. Raises ConfigError for a file without one training command."""
    start = training_start(file, _entry_place, _REMEDY)
    notes = list(start.notes)
    passes = []
    for words in start.passes:
        flags = list(_flags(words, notes))
        passes.append([_setting(file.name, flag, values) for flag, values in flags])
    settings = _with_further(file, one_setting_per_key(passes, start.line))
    notes += [f"--{setting.key}: {_ELSEWHERE[setting.key]}" for setting in settings if setting.key in _ELSEWHERE]
    entry = start.entry.rpartition("/")[2]
    return ForeignRun("slime", file, entry, "", settings, notes=tuple(dict.fromkeys(notes)))


def _with_further(file: Path, settings: tuple[ForeignSetting, ...]) -> tuple[ForeignSetting, ...]:
    """Return the settings with those of the YAML file of --custom-config-path, which replace flags. Without it if it is not there."""
    named = next((setting for setting in settings if setting.key == _FURTHER), None)
    found = file_beside(file, str(named.value)) if named is not None and named.is_known else None
    if found is None:
        return settings
    flags = [setting for setting in settings if setting is not named]
    further = load_tree(found).items()
    return last_of_each_key([*flags, *(ForeignSetting(k.replace("_", "-"), v, found.name) for k, v in further)])


def _entry_place(words: Sequence[str]) -> int | None:
    """Return the place of slime's training program after python, which flags follow."""
    for place, word in enumerate(words[1:], 1):
        if word.rpartition("/")[2] in _ENTRIES and any("python" in before for before in words[:place]):
            return place
    return None


def _flags(words: Sequence[Value], notes: list[str]) -> Iterator[tuple[Value, list[Value]]]:
    """Yield each flag with its values. Words before the first flag are noted."""
    flag: Value | None = None
    values: list[Value] = []
    for word in words:
        if word.text.startswith("--") and len(word.text) > 2:
            if flag:
                yield flag, values
            flag, values = word, []
        elif flag and values and flag.text[2:] in _JSON and _is_whole_json(values):
            notes.append(f"line {word.line}: {word.text} may hold further flags; write them into a copy of the script")
        elif flag and not (_is_a_whole_variable(word) and (values or _takes_no_value(flag))):
            values.append(word)
        elif word.text:
            notes.append(f"line {word.line}: {word.text} may hold further flags; write them into a copy of the script")
    if flag:
        yield flag, values


def _is_whole_json(values: Sequence[Value]) -> bool:
    """Return True if the words are a JSON value already: what follows is none of it."""
    text = " ".join(value.text for value in values)
    return isinstance(_parsed_json(text), dict | list)


def _parsed_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _is_a_whole_variable(word: Value) -> bool:
    """Return True for a variable that is not known and may hold further flags."""
    return any(word.text == f"${{{name}}}" for name in word.unknown)


def _takes_no_value(flag: Value) -> bool:
    name = flag.text[2:]
    return name.startswith(("use-", "disable-", "no-")) or name in (
        "colocate",
        "sequence-parallel",
        "apply-chat-template",
    )


def _setting(name: str, flag: Value, values: list[Value]) -> ForeignSetting:
    key, sign, first = flag.text[2:].partition("=")
    words = [*([first] if sign else []), *(value.text for value in values)]
    found: Any = _parsed(key, words)
    if key in _OPPOSITES:
        key, found = _OPPOSITES[key], False
    others = [_parsed(key, [other]) for other in values[0].others] if len(values) == 1 else []
    return ForeignSetting(
        key,
        found,
        f"{name} line {flag.line}",
        _all(value.unknown for value in (flag, *values)),
        tuple(others),
        _all(value.depends for value in (flag, *values)),
    )


def _parsed(key: str, words: Sequence[str]) -> Any:
    """Return the value of a flag: True without words, numbers as numbers, several words as a list."""
    if not words:
        return True
    if key in _JSON:
        return _parsed_json(" ".join(words))
    numbers: list[Any] = [_number(word) for word in words]
    return numbers if len(numbers) > 1 or key in _LISTS else numbers[0]


def _number(word: str) -> Any:
    found = plain(word)
    return found if isinstance(found, int | float) and not isinstance(found, bool) else word


def _all(groups: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(item for group in groups for item in group))
