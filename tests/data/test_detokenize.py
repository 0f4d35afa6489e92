"""Texts of responses by batches: the same as one by one, for every kind of tokenizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dapo_mcore.data.detokenize import decode_responses

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


class Shouting(PreTrainedTokenizerFast):
    def _decode(self, *args: Any, **options: Any) -> str:
        return super()._decode(*args, **options).upper()


def byte_level(kind: type = PreTrainedTokenizerFast, **options: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes: ids 0 … 255 in the order of BYTES, 256 a merge, 257 the special end token."""
    vocab = {byte: number for number, byte in enumerate(BYTES)} | {"ab": 256}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return kind(tokenizer_object=backend, eos_token="<end>", **options)


def word_piece() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "so": 1, "##me": 2, ".": 3, "ab": 4}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=True)


def test_texts_by_hand() -> None:
    tokenizer = byte_level()
    euro = tokenizer.encode("€", add_special_tokens=False)  # three bytes
    end = tokenizer.eos_token_id
    responses = [
        np.array([256, end], np.int32),  # "ab", and the special token is left out
        np.array([end, *euro, end, 256], np.int32),
        np.array(euro[:2], np.int32),  # two of three bytes: no character
        np.zeros(0, np.int32),
    ]
    assert decode_responses(tokenizer, responses) == ["ab", "€ab", "\ufffd", ""]
    assert decode_responses(tokenizer, []) == []


@pytest.mark.parametrize(
    "tokenizer",
    [byte_level(), byte_level(clean_up_tokenization_spaces=True), byte_level(Shouting), word_piece()],
    ids=["bytes", "with clean-up", "own decode", "word pieces"],
)
def test_a_batch_has_the_texts_of_its_responses_one_by_one(tokenizer: PreTrainedTokenizerFast) -> None:
    luck = np.random.default_rng(0)
    responses = [luck.integers(0, len(tokenizer), luck.integers(0, 40)).astype(np.int32) for _ in range(150)]
    alone = [tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
    assert decode_responses(tokenizer, responses) == alone


def test_the_library_decodes_batches_and_not_the_python_method(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level()
    monkeypatch.setattr(tokenizer, "decode", lambda *_, **__: pytest.fail("decoded one by one, holding the GIL"))
    assert decode_responses(tokenizer, [np.array([256], np.int32)] * 100) == ["ab"] * 100
