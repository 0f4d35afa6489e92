"""A model folder whose tokens are characters: <pad> 0, <eos> 1, <bos> 2, <unk> 3, then one id per character."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
CHARACTERS = "".join(map(chr, range(33, 127)))
CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 128,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 5000.0,
}


def write_tokenizer(folder: Path, **special: str) -> None:
    """Write tokenizer.json and tokenizer_config.json of a word-level model, which Qwen2's own class cannot rebuild."""
    vocab = {token: index for index, token in enumerate([*SPECIAL, " ", "\n", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
