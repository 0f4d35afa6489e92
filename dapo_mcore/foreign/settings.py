"""What the readers of foreign runs return: settings under the source's own names, with their place and what is not known.

Change here: the records between the readers (read/) and the conversion (tables/).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

NOT_COPIED = "(a secret: not copied)"
"""Stands for the value of a setting whose name says that it is a key, a token or a password."""
_SECRET_NAMES = (
    "api_key",
    "apikey",
    "wandb_key",
    "hf_token",
    "auth_token",
    "access_token",
    "secret",
    "password",
    "credentials",
)


@dataclass(frozen=True, slots=True)
class ForeignSetting:
    """One setting of a foreign run, as that framework would parse it.

    key: the dotted name without + (`actor_rollout_ref.rollout.n`), a flag without its dashes (`rollout-batch-size`).
    value: a bool, int, float, str, list, dict or None. If `unknown` is not empty it is text with `${NAME}` left in place.
    where: `run.sh line 41`, `config.yaml` or `run.sh line 41 (removed with ~)`.
    unknown: what only a run of the script would tell: `MODEL_PATH` (a variable of the environment), `argument 1`, `$(hostname)`.
    others: further values that the script may give it, by a condition or a loop. `value` is the first of them.
    depends: the places of these conditions, `line 12: if [ "$MODE" = fast ]`; not empty if `others` is not, or if the
        setting is left out under the condition.
    removed: True for hydra's `~key`.

    Example: `data.train_batch_size=${BSZ:-512}` in line 9 gives ForeignSetting("data.train_batch_size", 512, "run.sh line 9").
    """

    key: str
    value: Any
    where: str
    unknown: tuple[str, ...] = ()
    others: tuple[Any, ...] = ()
    depends: tuple[str, ...] = ()
    removed: bool = False

    @property
    def is_known(self) -> bool:
        """True if the file alone says the value: nothing to ask."""
        return not self.unknown and not self.depends


@dataclass(frozen=True, slots=True)
class ForeignRun:
    """A foreign run as its file tells it.

    dialect: `verl`, `slime` or `nemo`.
    entry: the program that the script starts: `verl.trainer.main_ppo`, `train_async.py`; "" for a YAML file.
    config: the configuration that the settings override, without its suffix: `ppo_megatron_trainer`; "" for the entry's own.
    settings: one per key, in the order of the file; a later one has replaced an earlier one.
    complete: True if the file holds all defaults itself (hydra's resolved YAML): nothing is to be filled in.
    notes: what a reader could not follow, a sentence each: a sourced file that is not there, `"$@"`.
    """

    dialect: str
    file: Path
    entry: str
    config: str
    settings: tuple[ForeignSetting, ...]
    complete: bool = False
    notes: tuple[str, ...] = ()

    def by_key(self) -> dict[str, ForeignSetting]:
        """Return {key: setting}."""
        return {setting.key: setting for setting in self.settings}


def without_secret(setting: ForeignSetting) -> ForeignSetting:
    """Return the setting, its value replaced if its name says that it is a secret."""
    name = setting.key.rpartition(".")[2].lower().replace("-", "_")
    if setting.value is None or not name.endswith(_SECRET_NAMES):
        return setting
    return replace(setting, value=NOT_COPIED, others=(), unknown=())


def last_of_each_key(settings: list[ForeignSetting]) -> tuple[ForeignSetting, ...]:
    """Return one setting per key: the last, in the place of the first, with secrets left out."""
    return tuple({setting.key: without_secret(setting) for setting in settings}.values())
