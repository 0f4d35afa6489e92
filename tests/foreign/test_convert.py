"""Every setting of a run is accounted for, and what the file does not say is asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dapo_mcore.errors import ConfigError
from dapo_mcore.foreign.convert import changes_objective, convert
from dapo_mcore.foreign.settings import ForeignRun, ForeignSetting
from dapo_mcore.foreign.table import Table
from dapo_mcore.foreign.tables.nemo import NEMO
from dapo_mcore.foreign.tables.slime import SLIME
from dapo_mcore.foreign.tables.verl import VERL
from tests.foreign.verl_runs import GRPO, M, R, imported, verl_run


def with_setting(run: ForeignRun, key: str, **changes: object) -> ForeignRun:
    settings = tuple(replace(s, **changes) if s.key == key else s for s in run.settings)  # type: ignore[arg-type]
    return replace(run, settings=settings)


def test_a_setting_that_the_table_does_not_know_is_a_loss() -> None:
    conversion = imported({**GRPO, "trainer.mystery": 1, "algorithm.new_baseline": "x"})
    assert [setting.key for setting in conversion.unknown] == ["trainer.mystery", "algorithm.new_baseline"]
    assert conversion.losses == {"trainer.mystery": False, "algorithm.new_baseline": True}
    assert conversion.unaccepted([]) == ["algorithm.new_baseline"]
    assert conversion.unaccepted(["algorithm.new_baseline"]) == []


@pytest.mark.parametrize(
    ("key", "objective"),
    [
        ("actor_rollout_ref.actor.policy_loss.new_ratio", True), ("reward.new", True), ("algorithm.positive_advantage_weight", True),
        ("actor_rollout_ref.actor.optim.new_decay_weight", False), ("trainer.log_reward_path", False), ("trainer.mystery", False),
    ],
)  # fmt: skip
def test_names_that_say_that_they_change_the_objective(key: str, objective: bool) -> None:
    assert changes_objective(key) == objective


def test_only_what_is_lost_can_be_accepted() -> None:
    with pytest.raises(ConfigError, match=r"--accept data\.seed: this is no lost setting; nothing is lost"):
        imported({**GRPO, "data.seed": 1}).unaccepted(["data.seed"])


def test_a_value_of_the_environment_is_asked_for() -> None:
    run = with_setting(verl_run({**GRPO, f"{R}.n": "${GROUP}"}), f"{R}.n", unknown=("GROUP",))
    asked = convert(run, VERL).asked["rollout.group_size"]
    assert asked.note == "the script takes it from GROUP, which it does not say"


def test_paths_may_hold_variables() -> None:
    path = f"{M}.path"
    run = with_setting(verl_run({**GRPO, path: "${MODELS}/7b"}), path, unknown=("MODELS",))
    assert convert(run, VERL).values()["model.path"][0] == "${MODELS}/7b"


def test_a_value_that_depends_on_a_condition_is_asked_for() -> None:
    changes = {"others": (8,), "depends": ('line 3: if [ "$MODE" = fast ]',)}
    run = with_setting(verl_run({**GRPO, f"{R}.n": 16}), f"{R}.n", **changes)
    assert convert(run, VERL).asked["rollout.group_size"].note == '16 or 8, as line 3: if [ "$MODE" = fast ]'


def test_a_setting_that_is_removed_has_the_default() -> None:
    run = with_setting(verl_run({**GRPO, f"{R}.n": 16}), f"{R}.n", removed=True)
    conversion = convert(run, VERL)
    assert conversion.values()["rollout.group_size"][0] == 1


def test_a_complete_configuration_gets_no_defaults() -> None:
    run = replace(
        verl_run({**GRPO, **{key: value for key, value in VERL.defaults(verl_run({})).items() if key not in GRPO}}),
        complete=True,
    )
    assert "rollout.group_size" in convert(run, VERL).values()


def test_every_setting_has_a_fate() -> None:
    settings = {
        **GRPO,
        "critic.optim.lr": 1e-5,
        "trainer.total_epochs": 2,
        f"{R}.val_kwargs.n": 4,
        "data.gen_batch_size": 8,
    }
    conversion = imported(settings)
    assert all(conversion.kind_of(key) for key in settings)


def test_settings_are_records() -> None:
    assert ForeignSetting("a", 1, "run.sh line 1").is_known


@pytest.mark.parametrize(("table", "entry"), [(VERL, "verl.trainer.main_ppo"), (SLIME, "train.py"), (NEMO, "")])
def test_any_value_of_any_key_is_converted_or_refused_in_a_line(table: Table, entry: str) -> None:
    keys = {key for rule in table.rules for key in rule.keys if "*" not in key and "?" not in key}
    for key in sorted(keys):
        for value in (None, "text", -1, 0, [], {}):
            settings = (ForeignSetting(key, value, "run line 1"),)
            try:
                convert(ForeignRun(table.dialect, Path("run"), entry, "", settings), table)
            except ConfigError as error:
                assert "\n" not in str(error) and key in str(error)


@pytest.mark.parametrize("table", [VERL, SLIME, NEMO], ids=lambda table: table.dialect)
def test_a_setting_is_under_one_title_of_meaningless_ones(table: Table) -> None:
    keys = [key for rule in table.rules if rule.title for key in rule.keys]
    assert len(keys) == len(set(keys)), sorted({key for key in keys if keys.count(key) > 1})
