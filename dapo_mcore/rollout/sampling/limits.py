"""Limits of prompts, checked before an engine gets them.

Change here: limits that hold for every engine. SGLang 0.5.21 crashes on a token outside the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dapo_mcore.errors import RolloutError


def check_prompts(
    prompts: Sequence[np.ndarray], max_new_tokens: int | np.ndarray, vocab_size: int, context: int
) -> None:
    """Raise RolloutError for an empty prompt, one without room for `max_new_tokens` (of all, or int [P]), or an unknown token."""
    if not len(prompts):
        return
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    if lengths.min() == 0:
        raise RolloutError(f"prompt {int(lengths.argmin())} has no tokens; give it at least a BOS token")
    limits = np.broadcast_to(max_new_tokens, lengths.shape)
    number = int((lengths + limits).argmax())
    total = lengths[number] + limits[number]
    if total > context:
        raise RolloutError(
            f"prompt {number} has {lengths[number]} tokens; with max_new_tokens {limits[number]} that is {total}, "
            f"but the model has max_position_embeddings {context}; lower rollout.max_response_tokens, or shorten the prompt"
        )
    largest = max(int(prompt.max()) for prompt in prompts)
    if largest >= vocab_size:
        raise RolloutError(f"a prompt holds token {largest}, but the model's vocabulary has {vocab_size} tokens")
