"""The YAML of an imported run."""

from __future__ import annotations

from pathlib import Path

import pytest

from dapo_mcore.config.file import load_config
from dapo_mcore.errors import ConfigError
from dapo_mcore.foreign.write import default_of, run_yaml
from tests.foreign.verl_runs import GRPO, A, M, R, imported

MEGATRON = {
    **GRPO, f"{M}.path": "/m/7b", "data.train_files": "/d/train.parquet", "data.val_files": "/d/aime.parquet",
    f"{A}.megatron.tensor_model_parallel_size": 2, "trainer.total_training_steps": 100, f"{R}.name": "sglang", f"{R}.n": 16,
    "trainer.experiment_name": "first",
}  # fmt: skip


def test_a_line_per_key_that_differs_with_its_source() -> None:
    lines = run_yaml(imported({**MEGATRON, "trainer.test_freq": 20})).splitlines()
    assert lines[0].startswith("# run.sh in the words of dapo_mcore")
    assert "  path: /m/7b                               # actor_rollout_ref.model.path=/m/7b (line 3)" in lines
    assert "  dual_clip: 3.0                            # verl's default" in lines
    assert "  every: 20                                 # trainer.test_freq=20 (line 10)" in lines
    assert not any("group_size" in line for line in lines), "16 is our default, too"


def test_it_is_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(run_yaml(imported(MEGATRON)), encoding="utf-8")
    config = load_config(path)
    assert (config.name, config.parallel.tensor_parallel, config.rollout.group_size) == ("first", 2, 16)
    assert config.eval.sets["aime"].files == ["/d/aime.parquet"] and config.eval.temperature == 0
    assert config.algo.kl.coef == 0 and config.optimizer.weight_decay == 0.01


def test_open_decisions_stop_every_start_and_overrides_answer_them(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    fsdp = {key: value for key, value in MEGATRON.items() if "megatron" not in key}
    text = run_yaml(imported(fsdp))
    path.write_text(text, encoding="utf-8")
    assert (
        "# To decide before it starts, in this file or as KEY=VALUE on the command line: parallel.tensor_parallel."
        in text
    )
    assert "  # decide: FSDP has no layout" in text and "  tensor_parallel: ???" in text
    with pytest.raises(
        ConfigError, match=r"still to decide \(now \?\?\?\): parallel.tensor_parallel; .* parallel.tensor_parallel=…"
    ):
        load_config(path)
    assert load_config(path, ["parallel.tensor_parallel=4"]).parallel.tensor_parallel == 4


def test_prose_is_quoted_so_that_its_comment_is_none(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(run_yaml(imported({**MEGATRON, "data.train_files": "/d/a #1.parquet"})), encoding="utf-8")
    assert load_config(path).data.files == ["/d/a #1.parquet"]


@pytest.mark.parametrize(
    ("key", "default"),
    [
        ("rollout.group_size", 16),
        ("algo.kl.coef", 0.0),
        ("eval.sets.aime.max_prompt_tokens", 2048),
        ("data.files", None),
    ],
)
def test_our_defaults(key: str, default: object) -> None:
    assert default_of(key) == default
