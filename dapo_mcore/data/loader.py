"""Prompts in a seeded order, epoch after epoch, with a position that knows which order it is a place in.

Change here: the order of training prompts. Resume is exact because the order depends on (seed, epoch) alone,
never on how many prompts were taken at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dapo_mcore.data.identity import fingerprint
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
        self._order_of = {
            "num_prompts": len(prompts),
            "content": fingerprint(prompt.uid for prompt in prompts),
            "seed": seed if shuffle else None,
        }
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

    def state(self) -> dict[str, Any]:
        """The position: epoch, and offset in prompts within it (0 <= offset < number of prompts); and what gives the
        epochs' orders: the prompts in file order, by number and content, and the seed (None: not shuffled)."""
        return {"epoch": self._epoch, "offset": self._offset, "order": self._order_of}

    def load_state(self, state: Mapping[str, Any]) -> str:
        """Move to a position that `state()` gave, and return why that was impossible, or nothing.

        In another order the offset means other prompts, so a begun epoch is left and the next one begun.
        Raises CheckpointError for what can be no position.
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
            f"{_difference(stored, self._order_of)}, so the checkpoint's place in the data (epoch {epoch}, prompt {offset}) "
            f"means nothing here: epoch {self._epoch} of these data begins"
        )

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


def _difference(stored: Any, own: Mapping[str, Any]) -> str:
    """What has changed between two orders, as the beginning of a sentence."""
    if not isinstance(stored, Mapping):
        return "the checkpoint does not say which training data it belongs to"
    if stored.get("content") == own["content"]:
        return f"the order of the training data has changed (seed {stored.get('seed')}, now {own['seed']})"
    was, now = stored.get("num_prompts"), own["num_prompts"]
    how = f"{was} prompts, now {now}" if was != now else f"still {now} prompts, but of other content or order"
    return f"the training data have changed ({how})"
