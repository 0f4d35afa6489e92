"""Prompts in a seeded order, epoch after epoch, with a position of two numbers.

Change here: the order of training prompts. Resume is exact because the order depends on (seed, epoch) alone,
never on how many prompts were taken at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dapo_mcore.errors import CheckpointError, DataError
from dapo_mcore.types import Prompt


class PromptLoader:
    """An endless walk over `prompts`. Example: 3 prompts, take(2) twice gives 2 of epoch 0, then 1 and 1 of epoch 1."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool):
        if not prompts:
            raise DataError("no prompts to train on")
        self._prompts = prompts
        self._seed = seed
        self._shuffle = shuffle
        self._move_to(epoch=0, offset=0)

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts. Crosses as many epoch borders as n asks for."""
        assert n >= 0, n
        taken: list[Prompt] = []
        while len(taken) < n:
            chosen = self._order[self._offset : self._offset + n - len(taken)]
            taken += [self._prompts[index] for index in chosen]
            self._offset += len(chosen)
            if self._offset == len(self._prompts):
                self._move_to(self._epoch + 1, 0)
        return taken

    def state(self) -> dict[str, int]:
        """The position: epoch, and offset in prompts within it (0 <= offset < number of prompts)."""
        return {"epoch": self._epoch, "offset": self._offset}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Moves to a position that state() gave. Raises CheckpointError when it cannot be one of these prompts."""
        if set(state) != {"epoch", "offset"} or any(type(value) is not int for value in state.values()):
            raise CheckpointError(f"a data position is {{epoch, offset}} of two integers, got {dict(state)}")
        if state["epoch"] < 0 or not 0 <= state["offset"] < len(self._prompts):
            raise CheckpointError(
                f"the data position {dict(state)} does not fit {len(self._prompts)} prompts: epoch must be >= 0 and "
                f"offset below {len(self._prompts)}; resume with the data files the run was started with"
            )
        self._move_to(state["epoch"], state["offset"])

    def _move_to(self, epoch: int, offset: int) -> None:
        self._epoch, self._offset = epoch, offset
        self._order = (
            epoch_order(self._seed, epoch, len(self._prompts)) if self._shuffle else np.arange(len(self._prompts))
        )


def epoch_order(seed: int, epoch: int, num_prompts: int) -> np.ndarray:
    """int64 [num_prompts], a permutation: the indices sorted by Philox keys of (seed, epoch).

    numpy guarantees raw bit streams across versions, but not Generator.permutation; a resumed run must not depend on it.
    """
    keys = np.random.Philox(np.random.SeedSequence(seed % 2**64, spawn_key=(epoch,))).random_raw(num_prompts)
    return np.argsort(keys, kind="stable")
