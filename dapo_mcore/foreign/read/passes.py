"""The settings of a command that a loop runs several times, as one list.

Change here: what is kept of the passes of a loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dapo_mcore.foreign.settings import ForeignSetting, last_of_each_key


def one_setting_per_key(passes: Sequence[Sequence[ForeignSetting]], line: int) -> tuple[ForeignSetting, ...]:
    """Return one setting per key. A key that differs between passes of the command in `line` keeps the first value and names
    the others: a person must choose."""
    first, *rest = [last_of_each_key(settings) for settings in passes]
    merged: dict[str, ForeignSetting] = {setting.key: setting for setting in first}
    for settings in rest:
        for setting in settings:
            held = merged.setdefault(setting.key, setting)
            if held.value != setting.value and setting.value not in held.others:
                merged[setting.key] = _with_other(held, setting.value, f"line {line}: a loop runs it more than once")
    return tuple(merged.values())


def _with_other(setting: ForeignSetting, value: Any, condition: str) -> ForeignSetting:
    depends = tuple(dict.fromkeys((*setting.depends, condition)))
    return replace(setting, others=(*setting.others, value), depends=depends)
