"""The order of prompts: a permutation an epoch, independent of how it is cut, resumable to the prompt."""

from __future__ import annotations

import numpy as np
import pytest

from dapo_mcore.data.loader import PromptLoader, epoch_order
from dapo_mcore.errors import CheckpointError, DataError
from dapo_mcore.types import Prompt

PROMPTS = tuple(Prompt(f"t:{i}", np.array([i], np.int32), str(i), str(i)) for i in range(7))


def uids(loader: PromptLoader, *sizes: int) -> list[str]:
    return [prompt.uid for size in sizes for prompt in loader.take(size)]


def test_without_shuffle_it_is_file_order_again_and_again():
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


def test_the_order_is_fixed_for_all_time():
    """A resumed run may use another numpy: these numbers must never change."""
    assert epoch_order(seed=0, epoch=0, num_prompts=6).tolist() == [1, 4, 5, 2, 0, 3]
    assert epoch_order(seed=0, epoch=1, num_prompts=6).tolist() == [2, 3, 1, 0, 4, 5]


def test_negative_seeds_are_seeds_too():
    assert sorted(epoch_order(seed=-1, epoch=0, num_prompts=5).tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("taken", [0, 3, 7, 10, 14, 20])
def test_a_restored_loader_goes_on_exactly(taken: int):
    loader = PromptLoader(PROMPTS, seed=5, shuffle=True)
    loader.take(taken)
    state = loader.state()
    assert state == {"epoch": taken // 7, "offset": taken % 7}
    restored = PromptLoader(PROMPTS, seed=5, shuffle=True)
    restored.load_state(state)
    assert uids(restored, 9) == uids(loader, 9)


@pytest.mark.parametrize(
    "state",
    [
        {"epoch": 0, "offset": 7},
        {"epoch": -1, "offset": 0},
        {"epoch": 0, "offset": -1},
        {"epoch": 0},
        {"epoch": 0, "offset": 1.0},
        {"epoch": 0, "offset": True},
        {"epoch": 0, "offset": 0, "seed": 1},
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(state: dict):
    loader = PromptLoader(PROMPTS, seed=0, shuffle=True)
    loader.take(2)
    with pytest.raises(CheckpointError):
        loader.load_state(state)
    assert loader.state() == {"epoch": 0, "offset": 2}


def test_no_prompts_are_refused():
    with pytest.raises(DataError, match="no prompts"):
        PromptLoader((), seed=0, shuffle=True)
