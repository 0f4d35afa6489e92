"""Characters that a tokenizer has no token for, for tokenizers of every kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dapo_mcore.config.data import DataConfig
from dapo_mcore.data.characters import LostCharacters
from dapo_mcore.data.prompts import load_prompts
from dapo_mcore.errors import DataError
from examples.arithmetic import character_tokenizer

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
PIECES = [("<unk>", 0.0), ("▁", -1.0), ("a", -2.0), ("b", -2.0), ("▁ab", -3.0)]


def byte_level(*, symbols: list[str] = BYTES) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def pieces(*, byte_fallback: bool) -> Tokenizer:
    """A tokenizer as SentencePiece makes them: a text begins with ▁."""
    more = [(f"<0x{byte:02X}>", -9.0) for byte in range(256)] if byte_fallback else []
    tokenizer = Tokenizer(models.Unigram(PIECES + more, 0, byte_fallback))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def words(unk_token: str | None) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "ab": 1, "ba": 2}, unk_token))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def lower_case() -> Tokenizer:
    vocab = {"[UNK]": 0, "a": 1, "##b": 2, "b": 3, "##a": 4, "e": 5, "##e": 6}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


@pytest.mark.parametrize(
    ("made", "text", "lost"),
    [
        (byte_level(), "aé\n字😀\u200b\ue000", ""),
        (byte_level(symbols=["a", "Ã"]), "aé", "é"),  # é is the bytes Ã ©
        (character_tokenizer(), "What is 3+4?", "W h a t i s ?"),
        (character_tokenizer(), "<eos>3+4=\t", ""),
        (pieces(byte_fallback=True), "ab é字▁", ""),
        (pieces(byte_fallback=False), "ab aｂ é字", "é 字"),
        (words("<unk>"), "ab ba", ""),
        (words("<unk>"), "ab no", "n o"),
        (words(None), "ab ba", ""),
        (lower_case(), "aB é b\x00", ""),
        (lower_case(), "ab ×", "×"),
    ],
)
@pytest.mark.parametrize("declared", [True, False], ids=["declared", "undeclared"])
def test_the_characters_that_a_text_loses_are_reported(made: Tokenizer, text: str, lost: str, declared: bool) -> None:
    """transformers may know the unknown token, or only the tokenizer's model may."""
    unk = getattr(made.model, "unk_token", None) or ("<unk>" if isinstance(made.model, models.Unigram) else None)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token=unk if declared else None)
    characters = LostCharacters(tokenizer)
    for row in ("f row 1", "f row 2"):
        characters.check(text, tokenizer.encode(text, add_special_tokens=False), row)
    told = characters.report(3, "prompts of data")
    if not lost:
        assert told == ""
    else:
        assert told.startswith("2 of 3 prompts of data lose characters that the tokenizer has no token for: ")
        assert f": {lost} (first in f row 1);" in told


def load(folder: Path, *rows: dict, **settings):
    (folder / "f.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=character_tokenizer(), bos_token="<bos>", eos_token="<eos>")
    return load_prompts(DataConfig(files=[str(folder / "f.jsonl")], answer_key="a", **settings), tokenizer)


def test_a_set_reports_lost_characters_and_refuses_a_prompt_that_loses_all(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}+1=", "a": 1} for n in range(3)] + [{"prompt": f"Add {n}", "a": 1} for n in range(2)]
    (told,) = load(tmp_path, *rows).warnings()
    assert told == (
        f"warning: 2 of 5 prompts of data lose characters that the tokenizer has no token for: A d (first in {tmp_path}/f.jsonl "
        "row 4); the model never sees them: use a tokenizer that has them, or reword the rows"
    )
    empty = {"prompt": " Abc d", "a": 1}
    for add_bos in (False, True):
        with pytest.raises(
            DataError, match=r"row 6: the tokenizer has no token for any character of the text ' Abc d'; "
        ):
            load(tmp_path, *rows, empty, add_bos=add_bos)
    assert load(tmp_path, *rows, empty, on_bad_row="skip").num_bad_rows == 1
