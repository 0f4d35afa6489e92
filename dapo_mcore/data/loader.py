"""Prompts in a seeded order, epoch after epoch. A stored position also identifies the order that it belongs to.

Change here: the order of training prompts. It depends on (seed, epoch) alone, never on how many prompts are taken at a
time, so a resumed run continues exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dapo_mcore.data.identity import fingerprint
from dapo_mcore.errors import CheckpointError, DataError
from dapo_mcore.types import Prompt


class PromptLoader:
    """Iteration over `prompts`, `num_epochs` times or, if that is None, without an end. Example: of 3 prompts, take(2) twice gives 2
    of epoch 0, then 1 and 1 of epoch 1; with num_epochs 1 the second gives 1."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool, num_epochs: int | None = None):
        if not prompts:
            raise DataError("no prompts to train on")
        self._prompts, self._num_epochs = prompts, num_epochs
        self._seed = seed
        self._shuffle = shuffle
        self._order_of = {
            "num_prompts": len(prompts),
            "content": fingerprint(prompt.uid for prompt in prompts),
            "seed": seed if shuffle else None,
        }
        self._move_to(epoch=0, offset=0)

    @property
    def num_left(self) -> float:
        """Number of prompts until the last epoch is over; infinity without a last one."""
        if self._num_epochs is None:
            return math.inf
        return max(0, (self._num_epochs - self._epoch) * len(self._prompts) - self._offset)

    def take(self, n: int) -> list[Prompt]:
        """Return the next n prompts, across as many epochs as needed; fewer if the last epoch ends before."""
        assert n >= 0, n
        n = int(min(n, self.num_left))
        taken: list[Prompt] = []
        while len(taken) < n:
            chosen = self._order[self._offset : self._offset + n - len(taken)]
            taken += [self._prompts[index] for index in chosen]
            self._offset += len(chosen)
            if self._offset == len(self._prompts):
                self._move_to(self._epoch + 1, 0)
        return taken

    def state(self) -> dict[str, Any]:
        """Return the position: the epoch, and the offset in it (0 <= offset < number of prompts).

        `order` identifies the order of the epochs: number and content of the prompts in file order, and the seed (None:
        not shuffled).
        """
        return {"epoch": self._epoch, "offset": self._offset, "order": self._order_of}

    def load_state(self, state: Mapping[str, Any]) -> str:
        """Move to a position from `state()`. Return why that was impossible, or "".

        In another order the offset means other prompts, so the rest of a begun epoch is skipped.
        Raise CheckpointError for a value that cannot be a position.
        """
        epoch, offset, stored = state.get("epoch"), state.get("offset"), state.get("order")
        num_prompts = len(self._prompts) if stored == self._order_of else np.inf
        if type(epoch) is not int or type(offset) is not int or epoch < 0 or not 0 <= offset < num_prompts:
            raise CheckpointError(
                f"a data position is an epoch >= 0 and an offset from 0 to below the {len(self._prompts)} training prompts, "
                f"but the checkpoint has {dict(state)}; resume from an older checkpoint"
            )
        if stored == self._order_of:
            self._move_to(epoch, offset)
            return ""
        self._move_to(epoch + (offset > 0), 0)
        return (
            f"{_difference(stored, self._order_of)}, so the checkpoint's position (epoch {epoch}, prompt {offset}) does not "
            f"apply: training starts at epoch {self._epoch} of the new data"
        )

    def _move_to(self, epoch: int, offset: int) -> None:
        self._epoch, self._offset = epoch, offset
        self._order = (
            epoch_order(self._seed, epoch, len(self._prompts)) if self._shuffle else np.arange(len(self._prompts))
        )


def epoch_order(seed: int, epoch: int, num_prompts: int) -> np.ndarray:
    """Return int64 [num_prompts], a permutation: the indices sorted by Philox keys of (seed, epoch).

    numpy guarantees raw bit streams across versions, but not Generator.permutation, so a resumed run must not use it.
    """
    keys = np.random.Philox(np.random.SeedSequence(seed % 2**64, spawn_key=(epoch,))).random_raw(num_prompts)
    return np.argsort(keys, kind="stable")


def _difference(stored: Any, own: Mapping[str, Any]) -> str:
    """Return what has changed between two orders, as the beginning of a sentence."""
    if not isinstance(stored, Mapping):
        return "the checkpoint does not say which training data it belongs to"
    if stored.get("content") == own["content"]:
        return f"the order of the training data has changed (seed {stored.get('seed')}, now {own['seed']})"
    was, now = stored.get("num_prompts"), own["num_prompts"]
    how = f"{was} prompts, now {now}" if was != now else f"still {now} prompts, but of other content or order"
    return f"the training data have changed ({how})"
