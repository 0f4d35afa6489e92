"""A foreign run in our words: each rule of a dialect's table applied, and each of its settings accounted for.

Change here: how outcomes become our values, and which settings that no rule reads are taken for a loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dapo_mcore.config.foreign_names import TITLES
from dapo_mcore.errors import ConfigError, describe_error, listed, shortened
from dapo_mcore.foreign.settings import ForeignRun, ForeignSetting
from dapo_mcore.foreign.table import KINDS, Kind, Outcome, Rule, Source, Table, Undecided

_WORDS_OF_AN_OBJECTIVE = frozenset(
    [
        "adv",
        "advantage",
        "baseline",
        "clip",
        "critic",
        "cliprange",
        "entropy",
        "estimator",
        "gamma",
        "kl",
        "lam",
        "loss",
        "objective",
        "penalty",
        "ratio",
        "reward",
        "rewards",
        "tis",
        "tool",
        "tools",
        "value",
        "veto",
        "weight",
    ]
)
_NOT_OF_AN_OBJECTIVE = frozenset(["decay", "log", "path", "memory", "offload", "workers"])


@dataclass(frozen=True, slots=True)
class Conversion:
    """A foreign run in our words.

    run, table: what was converted by what.
    outcomes: in the order of the table, those of the source's defaults among them.
    unknown: settings that no rule of the table reads.
    """

    run: ForeignRun
    table: Table
    outcomes: tuple[Outcome, ...]
    unknown: tuple[ForeignSetting, ...]

    def kind_of(self, key: str) -> Kind | None:
        """Return what became of a setting, the worst if several rules read it; None for one that the table does not know."""
        kinds = {outcome.kind for outcome in self.outcomes if key in outcome.sources}
        return next((kind for kind in KINDS if kind in kinds), None)

    def is_given(self, outcome: Outcome) -> bool:
        """Return True if the run itself sets one of the outcome's sources; otherwise it follows from the source's defaults."""
        return bool(self.places(outcome)) or outcome.sources == (self.run.entry,)

    def places(self, outcome: Outcome) -> list[ForeignSetting]:
        """Return the settings of the run that an outcome comes from."""
        given = self.run.by_key()
        return [given[key] for key in dict.fromkeys(outcome.sources) if key in given]

    @property
    def asked(self) -> dict[str, Outcome]:
        """Each of our keys that a person must decide."""
        return {str(outcome.ours): outcome for outcome in self.outcomes if outcome.kind == "asked"}

    @property
    def losses(self) -> dict[str, bool]:
        """Each lost setting by its name, and whether its loss changes the objective."""
        known = {outcome.sources[0]: outcome.objective for outcome in self.outcomes if outcome.kind == "lost"}
        return known | {setting.key: self.optimises(setting) for setting in self.unknown}

    def optimises(self, setting: ForeignSetting) -> bool:
        """Return True if an unknown setting may be about what is optimised: by its section, or by its name."""
        return setting.key.startswith(self.table.optimises) or changes_objective(setting.key)

    def unaccepted(self, accepted: Sequence[str]) -> list[str]:
        """Return the lost settings that change the objective and are not accepted. Raise ConfigError for an accepted name that is
        not lost."""
        losses = self.losses
        if wrong := [name for name in accepted if name not in losses]:
            lost = f"lost are {listed(list(losses))}" if losses else "nothing is lost"
            raise ConfigError(f"--accept {wrong[0]}: this is no lost setting; {lost}")
        return [name for name, objective in losses.items() if objective and name not in accepted]

    def values(self) -> dict[str, tuple[Any, list[Outcome]]]:
        """Return {our key: (value, outcomes it comes from)}, without the asked ones. Parts of a mapping are put together."""
        values: dict[str, tuple[Any, list[Outcome]]] = {}
        for outcome in self.outcomes:
            if outcome.ours is None or outcome.kind == "asked" or outcome.ours in self.asked:
                continue
            old, sources = values.get(outcome.ours, (None, []))
            both = isinstance(old, dict) and isinstance(outcome.value, dict)
            values[outcome.ours] = (_merged(old, outcome.value) if both else outcome.value, [*sources, outcome])
        return values


def convert(run: ForeignRun, table: Table) -> Conversion:
    """Return the run in our words. Nothing is dropped: each of its settings is in an outcome, or among the unknown ones."""
    source = Source(run, table.defaults(run))
    outcomes: list[Outcome] = []
    for rule in table.rules:
        outcomes += _applied(rule, source)
    outcomes += _left_over(run, table, {key for outcome in outcomes for key in outcome.sources})
    unknown = (setting for setting in run.settings if not any(rule.reads(setting.key) for rule in table.rules))
    return Conversion(run, table, tuple(outcomes), tuple(unknown))


def changes_objective(key: str) -> bool:
    """Return True if the name of an unknown setting says that it is about what is optimised."""
    words = set(key.lower().replace("-", "_").replace(".", "_").split("_"))
    return bool(words & _WORDS_OF_AN_OBJECTIVE) and not words & _NOT_OF_AN_OBJECTIVE


def _applied(rule: Rule, source: Source) -> Iterator[Outcome]:
    """Yield the outcomes of a rule. Where it needs a value that the file alone does not say, our keys are asked for."""
    done: set[str] = set()
    source.read.clear()
    try:
        for outcome in rule.apply(source):
            if outcome.ours:
                done.add(outcome.ours)
            yield outcome
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise _no_such_value(rule, source, error) from error
    except Undecided as undecided:
        setting = source.setting(str(undecided))
        assert setting is not None
        if not rule.ours:
            yield Outcome(
                "lost", (setting.key,), note=f"{rule.about}; {_why_undecided(setting)}", objective=rule.objective
            )
        for ours in [key for key in rule.ours if key not in done]:
            yield Outcome("asked", (setting.key,), ours, note=_why_undecided(setting))


def _no_such_value(rule: Rule, source: Source, error: Exception) -> ConfigError:
    """Return the error for values that the framework itself would refuse, such as a text in place of a number."""
    given = [setting for setting in source.run.settings if setting.key in source.read or rule.reads(setting.key)]
    shown = ", ".join(f"{setting.key}={shortened(str(setting.value))} ({setting.where})" for setting in given)
    why = describe_error(error)
    return ConfigError(
        f"{shown or ', '.join(rule.keys)}: no value that {TITLES[source.run.dialect]} takes ({why}); mend the script first"
    )


def _why_undecided(setting: ForeignSetting) -> str:
    if setting.others:
        values = listed([setting.value, *setting.others])
        return f"{values}, as {' and '.join(setting.depends) or 'the script decides'}"
    return f"the script takes it from {', '.join(setting.unknown)}, which it does not say"


def _left_over(run: ForeignRun, table: Table, done: set[str]) -> Iterator[Outcome]:
    """Yield an outcome for each setting that a rule has read but that changes nothing in this run."""
    for setting in run.settings:
        if setting.key not in done and any(rule.reads(setting.key) for rule in table.rules):
            note = "removed in the script" if setting.removed else "without effect beside the other settings"
            yield Outcome("meaningless", (setting.key,), note=note)


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: _merged(old[key], value) if isinstance(old.get(key), dict) and isinstance(value, dict) else value
            for key, value in new.items()}  # fmt: skip
    return {**old, **both}
