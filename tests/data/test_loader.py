"""The order of prompts: one permutation per epoch, whatever the batch sizes are, and resumable at any prompt."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dapo_mcore.data.loader import PromptLoader, epoch_order
from dapo_mcore.errors import CheckpointError, DataError
from dapo_mcore.types import Prompt

PROMPTS = tuple(Prompt(f"t:{i}", np.array([i], np.int32), str(i), str(i)) for i in range(7))


def uids(loader: PromptLoader, *sizes: int) -> list[str]:
    return [prompt.uid for size in sizes for prompt in loader.take(size)]


def test_without_shuffle_every_epoch_has_the_order_of_the_file():
    assert uids(PromptLoader(PROMPTS, seed=0, shuffle=False), 5, 4) == [f"t:{i % 7}" for i in range(9)]


def test_each_epoch_is_its_own_permutation():
    order = uids(PromptLoader(PROMPTS, seed=3, shuffle=True), 21)
    epochs = [tuple(order[i : i + 7]) for i in (0, 7, 14)]
    assert all(sorted(epoch) == [p.uid for p in PROMPTS] for epoch in epochs)
    assert len(set(epochs)) == 3


def test_the_order_does_not_depend_on_how_many_are_taken_at_a_time():
    whole = uids(PromptLoader(PROMPTS, seed=3, shuffle=True), 30)
    assert uids(PromptLoader(PROMPTS, seed=3, shuffle=True), 1, 0, 6, 7, 16) == whole
    assert uids(PromptLoader(PROMPTS, seed=4, shuffle=True), 30) != whole


def test_the_order_never_changes_between_versions():
    """A resumed run may use another numpy: these numbers must never change."""
    assert epoch_order(seed=0, epoch=0, num_prompts=6).tolist() == [1, 4, 5, 2, 0, 3]
    assert epoch_order(seed=0, epoch=1, num_prompts=6).tolist() == [2, 3, 1, 0, 4, 5]


def test_negative_seeds_are_seeds_too():
    assert sorted(epoch_order(seed=-1, epoch=0, num_prompts=5).tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("taken", [0, 3, 7, 10, 14, 20])
def test_a_restored_loader_continues_at_the_same_prompt(taken: int):
    loader = PromptLoader(PROMPTS, seed=5, shuffle=True)
    loader.take(taken)
    state = json.loads(json.dumps(loader.state()))
    assert (state["epoch"], state["offset"]) == (taken // 7, taken % 7)
    restored = PromptLoader(PROMPTS, seed=5, shuffle=True)
    assert restored.load_state(state) == ""
    assert uids(restored, 9) == uids(loader, 9)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dict(prompts=PROMPTS[1:]), "the training data have changed (7 prompts, now 6)"),
        (
            dict(prompts=PROMPTS[::-1]),
            "the training data have changed (still 7 prompts, but of other content or order)",
        ),
        (dict(seed=6), "the order of the training data has changed (seed 5, now 6)"),
        (dict(shuffle=False), "the order of the training data has changed (seed 5, now None)"),
    ],
)
def test_a_position_in_other_data_or_another_order_starts_the_next_epoch(change: dict, told: str):
    before = dict(prompts=PROMPTS, seed=5, shuffle=True)
    loader = PromptLoader(**before)
    loader.take(10)
    moved = PromptLoader(**before | change)
    line = moved.load_state(loader.state())
    assert (
        line.startswith(told)
        and "(epoch 1, prompt 3) does not apply: training starts at epoch 2 of the new data" in line
    )
    fresh = PromptLoader(**before | change)
    fresh.take(2 * len(change.get("prompts", PROMPTS)))
    assert uids(moved, 9) == uids(fresh, 9)


def test_an_epoch_that_was_not_started_is_used_in_full_in_another_order():
    loader = PromptLoader(PROMPTS, seed=5, shuffle=True)
    loader.take(7)
    moved = PromptLoader(PROMPTS[:3], seed=5, shuffle=True)
    assert "training starts at epoch 1 of the new data" in moved.load_state(loader.state())


def test_a_position_without_its_data_starts_the_next_epoch():
    """Older checkpoints do not name the data of a position."""
    loader = PromptLoader(PROMPTS, seed=5, shuffle=True)
    line = loader.load_state({"epoch": 0, "offset": 3})
    assert line.startswith("the checkpoint does not say which training data it belongs to")
    assert (loader.state()["epoch"], loader.state()["offset"]) == (1, 0)


@pytest.mark.parametrize("wrong", [{"offset": 7}, {"epoch": -1}, {"offset": -1}, {"offset": None}, {"offset": True}])
def test_an_impossible_position_is_refused_and_changes_nothing(wrong: dict):
    loader = PromptLoader(PROMPTS, seed=0, shuffle=True)
    loader.take(2)
    before = loader.state()
    with pytest.raises(CheckpointError, match="below the 7 training prompts"):
        loader.load_state(before | wrong)
    assert loader.state() == before


def test_no_prompts_are_refused():
    with pytest.raises(DataError, match="no prompts"):
        PromptLoader((), seed=0, shuffle=True)
