"""Prompts that no engine could answer."""

from __future__ import annotations

import numpy as np
import pytest

from dapo_mcore.errors import RolloutError
from dapo_mcore.rollout.sampling.limits import check_prompts

LIMITS = dict(max_new_tokens=12, vocab_size=16, context=40)


def prompt(length: int, last: int = 15) -> np.ndarray:
    return np.array([*[3] * (length - 1), last][:length], dtype=np.int32)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (
            [prompt(3), prompt(29)],
            "prompt 1 has 29 tokens; with max_new_tokens 12 that is 41, .*max_position_embeddings 40",
        ),
        ([prompt(3), prompt(0)], "prompt 1 has no tokens; give it at least a BOS token"),
        ([prompt(3), prompt(2, last=16)], "a prompt holds token 16, .*vocabulary has 16"),
    ],
    ids=["long", "empty", "unknown"],
)
def test_unusable_prompts_are_refused_with_numbers(prompts, message):
    with pytest.raises(RolloutError, match=message):
        check_prompts(prompts, **LIMITS)


def test_the_longest_prompt_the_largest_token_and_no_prompt_at_all_pass():
    check_prompts([prompt(28)], **LIMITS)
    check_prompts([], **LIMITS)
