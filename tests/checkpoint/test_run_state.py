"""state.json and state.safetensors, without a model: they read back, and wrong old formats are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dapo_mcore.checkpoint.run_state import (
    FORMAT,
    RunState,
    TrainState,
    read_state,
    refuse_wrong_optimizer_state,
    write_state,
)
from dapo_mcore.errors import CheckpointError

TRAIN = TrainState(
    step=3,
    num_updates=5,
    weight_version=3,
    loader={"epoch": 0, "offset": 8},
    sampler={"groups": []},
    sampler_arrays={"token_ids": np.arange(3, dtype=np.int32)},
    config="parallel:\n  pipeline_parallel: 2\n",
)
STATE = RunState(FORMAT, TRAIN, {"tied": True, "moe_layers": []}, reference=False, adam_step=4.0)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_state(tmp_path, STATE)
    found = read_state(tmp_path)
    assert replace(found, train=TRAIN) == STATE
    assert replace(found.train, sampler_arrays={}) == replace(TRAIN, sampler_arrays={})
    assert found.train.sampler_arrays["token_ids"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("config", ["parallel: {pipeline_parallel: 2}", "parallel: [", "parallel: 3", ""])
def test_old_optimizer_state_that_may_be_wrong_is_refused(config: str) -> None:
    with pytest.raises(CheckpointError, match=r"its optimizer state is wrong.*with model\.path=run/step_000001"):
        refuse_wrong_optimizer_state(Path("run/step_000001"), old(config))


@pytest.mark.parametrize(
    ("config", "fits"),
    [
        ("parallel: {pipeline_parallel: 1}", {}),
        ("parallel: {pipeline_parallel: 2}", {"tied": False}),
        ("parallel: {pipeline_parallel: 2}", {"optimizer.distributed": False}),
    ],
)
def test_old_optimizer_state_that_is_right_is_read(config: str, fits: dict[str, Any]) -> None:
    refuse_wrong_optimizer_state(Path("run/step_000001"), old(config, **fits))


def test_numbered_checkpoints_are_right() -> None:
    refuse_wrong_optimizer_state(Path("run/step_000001"), replace(old("parallel: {pipeline_parallel: 2}"), format=2))


def old(config: str, **fits: Any) -> RunState:
    own = {"tied": True, "optimizer.distributed": True} | fits
    return RunState(1, replace(TRAIN, config=config), own, reference=False, adam_step=None)
