"""The text of generated responses.

Change here: how token ids become the text that reward functions and people read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_RESPONSES_AT_ONCE = 64
"""Their tokens are Python integers for a moment: 47 MB for 64 responses of 20,480 tokens."""
_BPE_CLEANS = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"


def decode_responses(
    tokenizer: PreTrainedTokenizerBase, responses: Sequence[np.ndarray], *, skip_special_tokens: bool = True
) -> list[str]:
    """Return the text of each response (int32 [T]), by default without special tokens, exactly as `tokenizer.decode` returns it.

    Where the tokenizers library alone decides the text, it decodes without the GIL, so that other threads go on meanwhile.
    """
    if not _is_decoded_by_the_library(tokenizer):
        return [tokenizer.decode(ids, skip_special_tokens=skip_special_tokens) for ids in responses]
    texts: list[str] = []
    for start in range(0, len(responses), _RESPONSES_AT_ONCE):
        ids = [response.tolist() for response in responses[start : start + _RESPONSES_AT_ONCE]]
        texts += tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=skip_special_tokens)
    return texts


def _is_decoded_by_the_library(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if `tokenizer.decode` adds nothing to what the tokenizers library does."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    kind = type(tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return False
    if kind.decode is not PreTrainedTokenizerBase.decode or kind._decode is not PreTrainedTokenizerFast._decode:
        return False
    is_bpe = type(tokenizer.backend_tokenizer.model).__name__ == "BPE"
    cleans = not is_bpe or getattr(tokenizer, _BPE_CLEANS, True)  # transformers 5 does not clean up texts of a BPE
    return not (tokenizer.clean_up_tokenization_spaces and cleans)
