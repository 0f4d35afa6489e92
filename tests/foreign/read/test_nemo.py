"""Configurations written in NeMo-RL's style."""

from __future__ import annotations

from pathlib import Path

import pytest

from dapo_mcore.errors import ConfigError
from dapo_mcore.foreign.read.nemo import read_nemo

BASE = "grpo: {num_prompts_per_step: 32, val_period: 10}\npolicy: {model_name: m, max_total_sequence_length: 512, optimizer: {name: a, kwargs: {lr: 1.0e-6}}}\n"
MIDDLE = "defaults: grpo_math_1B.yaml\ngrpo: {val_period: 5}\npolicy: {optimizer: {_override_: true, name: b}}\n"
TOP = "defaults: [../middle.yaml]\ngrpo:\n  num_prompts_per_step: 512\n  shaping: {max: '${policy.max_total_sequence_length}'}\npolicy: {mb: '${mul:${policy.max_total_sequence_length}, 2}'}\n"


def written(folder: Path) -> Path:
    (folder / "grpo_math_1B.yaml").write_text(BASE)
    (folder / "middle.yaml").write_text(MIDDLE)
    (folder / "recipes").mkdir()
    (folder / "recipes" / "top.yaml").write_text(TOP)
    return folder / "recipes" / "top.yaml"


def test_files_inherit_and_the_base_is_no_setting(tmp_path: Path) -> None:
    run = read_nemo(written(tmp_path))
    assert {setting.key: (setting.value, setting.where) for setting in run.settings} == {
        "grpo.num_prompts_per_step": (512, "top.yaml"),
        "grpo.val_period": (5, "middle.yaml"),
        "grpo.shaping.max": (512, "top.yaml"),
        "policy.optimizer.name": ("b", "middle.yaml"),
        "policy.mb": (1024, "top.yaml"),
    }
    assert not run.complete and run.notes == ()


def test_defaults_that_are_not_there_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("defaults: gone.yaml\ngrpo: {n: 1}\npolicy: {}\n")
    assert read_nemo(tmp_path / "a.yaml").notes == (
        "a.yaml: its defaults name gone.yaml, which is not there: NeMo-RL's own defaults hold instead",
    )


def test_a_script_with_overrides(tmp_path: Path) -> None:
    written(tmp_path)
    script = tmp_path / "run.sh"
    script.write_text(
        "cd $ROOT\nuv run examples/run_grpo.py --config recipes/top.yaml \\\n  grpo.val_period=7 policy.model_name=$MODEL $@ 2>&1 | tee log"
    )
    found = read_nemo(script).by_key()
    assert (found["grpo.val_period"].value, found["grpo.val_period"].where) == (7, "run.sh line 3")
    assert (found["policy.model_name"].value, found["policy.model_name"].unknown) == ("${MODEL}", ("MODEL",))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "defaults: a.yaml\ngrpo: {}\npolicy: {}", "its defaults lead in a circle"),
        ("a.yaml", "sft: {}", "no section grpo"),
        (
            "run.sh",
            "uv run examples/run_grpo.py --config $CONFIG",
            r"that configuration is not beside the script; import the YAML file itself",
        ),
        ("run.sh", "echo", "no training command in this script; give NeMo-RL's YAML"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_nemo(tmp_path / name)
