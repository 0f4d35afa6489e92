"""The report of an import: worst first, every setting counted once."""

from __future__ import annotations

from dapo_mcore.foreign.report import counts, report
from tests.foreign.verl_runs import A, M, R, imported

SETTINGS = {
    "algorithm.adv_estimator": "opo", f"{R}.n": 8, "trainer.test_freq": -1, "trainer.val_before_train": False,
    f"{A}.optim.lr_warmup_steps": 10, f"{A}.fsdp_config.param_offload": True, f"{A}.fsdp_config.optimizer_offload": True,
    f"{M}.external_lib": "lib", "trainer.mystery": 3, "trainer.total_training_steps": 9,
}  # fmt: skip
RECOMPUTED = {"granularity": "full", "method": "uniform", "num_layers": 1}


def test_every_setting_is_counted_once() -> None:
    found = counts(imported(SETTINGS))
    assert found == {"same": 2, "converted": 1, "meaningless": 4, "lost": 2, "asked": 0, "unknown": 1}
    assert sum(found.values()) == len(SETTINGS)


def test_the_worst_comes_first() -> None:
    text = report(imported(SETTINGS))
    lines = text.splitlines()
    assert lines[0] == (
        "run.sh: 10 settings of verl: 2 kept, 1 converted, 4 meaningless here, 2 lost, 1 not known to the table"
    )
    assert lines[1] == "What it leaves out has the defaults of verl b178a3c (2026-01-29): 3 to decide."
    titles = [line.split(" (")[0].split(":")[0] for line in lines if line[:1].isupper()]
    assert titles == [
        "What it leaves out has the defaults of verl b178a3c", "LOST, AND IT CHANGES WHAT IS OPTIMISED", "LOST", "TO DECIDE",
        "CONVERTED", "KEPT", "DEFAULTS OF VERL that the run relies on, and that are not ours", "MEANINGLESS HERE",
    ]  # fmt: skip
    assert "accept what you can do without: --accept algorithm.adv_estimator" in text
    assert "   1  algorithm.adv_estimator=opo" in lines
    assert "   9  trainer.mystery=3" in lines


def test_a_setting_that_is_kept_and_one_that_is_converted() -> None:
    lines = report(imported(SETTINGS)).splitlines()
    assert any("   2  rollout.n=8 → rollout.group_size" in line for line in lines)
    assert any(
        "actor.optim.lr_warmup_steps=10" in line and "→ optimizer.warmup_rollout_steps: 10" in line for line in lines
    )


def test_settings_without_a_meaning_share_a_line() -> None:
    text = report(imported(SETTINGS))
    assert (
        "      actor.fsdp_config.param_offload, actor.fsdp_config.optimizer_offload: sharding and offloading: " in text
    )


def test_accepted_losses_are_told_as_such() -> None:
    assert "OPTIMISED: accepted" in report(imported(SETTINGS), ["algorithm.adv_estimator"])


def test_a_row_holds_all_that_follows_from_the_same_settings_and_a_shared_note_once() -> None:
    lines = report(
        imported({**SETTINGS, "trainer.test_freq": 5, "data.val_files": ["/d/a.parquet", "/d/b.parquet"]})
    ).splitlines()
    (row,) = [place for place, line in enumerate(lines) if "data.val_files=" in line]
    told = " ".join(line.strip() for line in lines[row : row + 3])
    assert told.count("a named set per file") == 1 and "eval.sets.a.files" in told and "eval.sets.b.files" in told


def test_kept_settings_are_listed_once_two_to_a_line() -> None:
    conversion = imported(SETTINGS)
    lines = report(conversion).splitlines()
    (first,) = [place for place, line in enumerate(lines) if line.startswith("KEPT")]
    assert lines[first].endswith(f"({counts(conversion)['same']})")
    assert lines[first + 1].split(" → ")[1:] and lines[first + 1].count("→") == 2 and not lines[first + 2]


def test_the_configuration_whose_defaults_hold_is_named() -> None:
    text = report(imported(SETTINGS, config="ppo_megatron_trainer"))
    assert "What it leaves out has the defaults of verl b178a3c (2026-01-29), ppo_megatron_trainer" in text


def test_a_lost_program_is_no_lost_default() -> None:
    text = report(imported({**SETTINGS, "algorithm.adv_estimator": "grpo"}, entry="recipe.spin.main_spin"))
    assert "defaults of verl b178a3c (2026-01-29): 3 to decide." in text
    assert text.splitlines()[0].endswith("; its program is lost")


def test_a_number_of_a_set_alone_is_told_and_no_row_is_wide() -> None:
    config = f"{A}.megatron.override_transformer_config"
    evaluated = {"trainer.test_freq": 5, "data.val_files": "/d/a.parquet", "data.val_max_samples": 64}
    recomputed = {f"{config}.recompute_{name}": value for name, value in RECOMPUTED.items()}
    text = report(imported({**SETTINGS, **evaluated, **recomputed}))
    assert "→ eval.sets.a.limit: 64" in text and "eval.sets.a.deduplicate" not in text
    wide = [line for line in text.splitlines() if len(line) > 130 and not line.startswith(("LOST", "TO DECIDE"))]
    assert "recompute_num_layers=1" in text and wide == []


def test_what_is_written_beside_a_loss_points_to_it() -> None:
    text = report(
        imported({**SETTINGS, "algorithm.adv_estimator": "grpo", "reward_model.reward_manager": "elliptical"})
    )
    assert text.count("reward_model.reward_manager=elliptical") == 2
    assert "LOST says what this leaves out" in " ".join(text.partition("CONVERTED")[2].split())
