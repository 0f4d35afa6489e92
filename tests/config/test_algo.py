"""The objective: defaults and rules."""

from __future__ import annotations

from pathlib import Path

from dapo_mcore.config.file import load_config


def test_a_minimal_file_gets_the_papers_defaults(file: Path) -> None:
    config = load_config(file)
    assert (config.algo.clip_low, config.algo.clip_high, config.algo.dual_clip) == (0.2, 0.28, None)
    assert config.algo.loss_mode == "token-mean"
    assert config.run_dir == Path("runs/run")
