"""A tokenizer whose token n is the n-th printable sign, so that a text of k signs is k tokens."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dapo_mcore.types import Rollout

SIGNS = sorted(pre_tokenizers.ByteLevel.alphabet())


def speller(size: int, *merges: tuple[str, str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of `size` tokens, the last of which are merges."""
    vocab = {sign: number for number, sign in enumerate([*SIGNS[: size - len(merges)], *map("".join, merges)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def first_end(tokenizer: PreTrainedTokenizerFast, rollout: Rollout, texts: tuple[str, ...]) -> int | None:
    """Return the number of tokens until the response has one of the texts, by decoding each beginning of it."""
    ids = rollout.token_ids.tolist()
    return next((n for n in range(1, len(ids) + 1) if any(text in tokenizer.decode(ids[:n]) for text in texts)), None)
