"""The same quantity in two units."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from dapo_mcore.config.file import dump_config, load_config, parse_config
from dapo_mcore.errors import ConfigError

TREE = {
    "model": {"path": "model"},
    "data": {"files": ["train.jsonl"]},
    "rollout": {"group_size": 6},
    "sampling": {"train_batch_prompts": 12, "gen_batch_prompts": 12},
}


def config(**sections: Any) -> Any:
    return parse_config(TREE | sections)


def test_a_mini_batch_in_samples_is_the_one_in_prompts():
    assert config(batch={"mini_batch_samples": 24}).batch == config(batch={"mini_batch_prompts": 4}).batch


@pytest.mark.parametrize(
    ("samples", "use"),
    [(20, "18 or 24"), (30, "24 or 36"), (5, "6"), (100, "72")],
    ids=["part", "divides", "few", "many"],
)
def test_a_mini_batch_of_parts_of_groups_or_unequal_ones_is_refused(samples, use):
    with pytest.raises(ConfigError, match=rf"mini_batch_samples {samples}: .*group_size 6, .*_prompts 12; use {use}$"):
        config(batch={"mini_batch_samples": samples})


@pytest.mark.parametrize("section", ["optimizer", "critic"])
def test_a_schedule_in_rollout_steps_is_the_one_in_gradient_steps(section):
    """12 prompts a step in mini-batches of 4, twice over: 3 × 2 = 6 gradient steps."""
    keys = {"schedule": "cosine", "warmup_rollout_steps": 10, "decay_rollout_steps": 200}
    gae = {"algo": {"advantage": "gae"}} if section == "critic" else {}
    value = keys if section == "optimizer" else {"optimizer": keys}
    made = config(batch={"mini_batch_samples": 24, "epochs": 2}, **gae, **{section: value})
    optimizer = made.optimizer if section == "optimizer" else made.critic.optimizer
    assert (optimizer.warmup_updates, optimizer.decay_updates) == (60, 1200)
    assert parse_config(_tree(dump_config(made))) == made


def test_without_either_unit_the_default_holds_as_before():
    made = config(batch={"mini_batch_prompts": None}, sampling={"train_batch_prompts": 64})
    assert made.batch.mini_batch_prompts == 32
    assert made.optimizer.warmup_updates == made.critic.optimizer.warmup_updates == 10
    assert made.optimizer.decay_updates is None
    assert (made.num_rollout_steps, made.num_epochs) == (100, None)
    assert config(optimizer={"warmup_rollout_steps": 0}, batch={"mini_batch_prompts": 4}).optimizer.warmup_updates == 0


def test_epochs_leave_the_number_of_steps_open():
    made = config(num_epochs=3, batch={"mini_batch_prompts": 4}, observe={"profile_steps": [900]})
    assert (made.num_rollout_steps, made.num_epochs) == (None, 3)
    assert parse_config(_tree(dump_config(made))) == made


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"num_epochs": 2, "num_rollout_steps": 9},
            "num_rollout_steps 9 and num_epochs 2 set the same quantity in two units; keep one",
        ),
        (
            {"batch": {"mini_batch_prompts": 4, "mini_batch_samples": 24}},
            "batch: mini_batch_prompts 4 and mini_batch_samples 24",
        ),
        (
            {"critic": {"optimizer": {"warmup_updates": 1, "warmup_rollout_steps": 1}}},
            "critic.optimizer: warmup_updates 1 and warmup_rollout_steps 1",
        ),
        ({"optimizer": {"decay_updates": 5, "decay_rollout_steps": 1}}, "optimizer: decay_updates 5 and decay"),
    ],
)
def test_both_units_at_once_are_refused(sections, message):
    with pytest.raises(ConfigError, match=message):
        config(**{"batch": {"mini_batch_prompts": 4}} | sections)


def test_an_override_changes_the_unit_of_a_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("num_rollout_steps: 7\nmodel: {path: m}\ndata: {files: [t.jsonl]}\n")
    assert load_config(file, ["num_rollout_steps=null", "num_epochs=2"]).num_epochs == 2
    with pytest.raises(ConfigError, match="leave the other out or null"):
        load_config(file, ["num_epochs=2"])


def _tree(text: str) -> dict[str, Any]:
    return yaml.safe_load(text)
