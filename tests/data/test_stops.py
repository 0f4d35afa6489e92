"""Where a response ends, with a tokenizer of bytes and merges: texts over several tokens, inside one, and in part of a character."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dapo_mcore.config.data import DataConfig
from dapo_mcore.config.file import parse_config
from dapo_mcore.data.chat import PromptRenderer
from dapo_mcore.data.stops import Stops, StopTexts, end_of_turn, read_stops
from dapo_mcore.errors import ConfigError

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("<", "/"), ("a", "n"), ("an", "s"), ("</", "ans"), (">", "x"), ("s", ">"), ("b", "</")]


def tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    vocab = {byte: number for number, byte in enumerate([*BYTES, *("".join(pair) for pair in MERGES)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=MERGES))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    made.chat_template = template
    return made


def ids(*tokens: str) -> np.ndarray:
    """Return token ids; the text of a token is cut into its bytes if it is none of the vocabulary."""
    made = tokenizer()
    vocab, alphabet = made.get_vocab(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merged = {"".join(pair) for pair in MERGES}
    names = [
        name for token in tokens for name in ([token] if token in merged else alphabet.pre_tokenize_str(token)[0][0])
    ]
    return np.array([vocab[name] for name in names], np.int32)


@pytest.mark.parametrize(
    ("tokens", "length"),
    [
        (("</ans", ">x", "a"), 2),
        (("a", "b</", "an", "s>", "a"), 4),
        (("<", "/", "a", "n", "s", ">", "a"), 6),
        (("a", "</ans", "a", "</ans", ">", ">"), 5),
        (("</ans",), None),
        (("a", "n", "s", ">"), None),
    ],
)
def test_a_text_ends_with_the_token_that_completes_it(tokens, length):
    assert StopTexts(["</ans>"], tokenizer()).length(ids(*tokens)) == length


def test_a_text_of_several_bytes_a_character_is_found_when_its_last_byte_is_there():
    found = ids("a", "中", "é", "x")
    assert len(found) == 7
    assert StopTexts(["中é"], tokenizer()).length(found) == 6
    assert StopTexts(["é"], tokenizer()).length(found[2:]) == 4, "cut inside a character before"
    assert StopTexts(["中é"], tokenizer()).length(found[:5]) is None


def test_the_first_of_several_texts_ends_a_response():
    texts = StopTexts(["ans>", "x"], tokenizer())
    assert texts.length(ids("a", ">x", "ans", ">")) == 2 and texts.length(ids("</ans", ">", "x")) == 2


def test_any_cut_of_any_text_ends_where_decoding_all_of_it_says():
    draw, made = random.Random(1), tokenizer()
    stops = StopTexts(["</ans>", "s>x", "é\n", "中"], made)
    vocab = [token for token in range(len(made)) if made.convert_ids_to_tokens(token) != "<|im_end|>"]
    likely = ids("</ans", ">", "x", "s>", ">x", "é", "\n", "中", "a").tolist()
    for _ in range(300):
        tokens = np.array([draw.choice(likely if draw.random() < 0.9 else vocab) for _ in range(30)], np.int32)
        decoded = [made.decode(tokens[:length]) for length in range(1, 31)]
        expected = next((n for n, text in enumerate(decoded, 1) if any(stop in text for stop in stops.texts)), None)
        assert stops.length(tokens) == expected


def test_tokens_that_cannot_complete_a_text_are_not_decoded(monkeypatch):
    stops = StopTexts(["</ans>"], tokenizer())
    assert [stops.may_end[token] for token in ids(">", ">x", "s>", "ans", "a", "<")] == [True] * 3 + [False] * 3
    monkeypatch.setattr(StopTexts, "ended", lambda *_: pytest.fail("decoded"))
    assert stops.length(ids("a", "<", "ans", "b</")) is None
    assert stops.length(np.array([10_000], np.int32)) is None, "a token that only the model has"


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "token"),
    [
        (CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", "<|im_end|>"),
        ("{% for m in messages %}{{ m.content }} {% endfor %}", None),
        ("{% for m in messages %}{{ m.content }}\nUser: {% endfor %}", None),
        ("{{ raise_exception('only questions') if messages|length > 1 }}", None),
    ],
)
def test_the_control_token_after_an_answer_ends_a_turn(template: str, token: str | None):
    made = tokenizer(template)
    renderer = PromptRenderer(DataConfig(files=["x"], chat_template=True), made)
    assert end_of_turn(renderer) == (token and made.convert_tokens_to_ids(token))
    assert end_of_turn(PromptRenderer(DataConfig(files=["x"], chat_template=False), made)) is None


def config(tmp_path, prompt, stop=(), **data):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": prompt, "answer": "1"}))
    data = {"files": str(tmp_path / "rows.jsonl"), "answer_key": "answer", **data}
    return parse_config({"model": {"path": str(tmp_path)}, "data": data, "rollout": {"stop": list(stop)}})


@pytest.fixture
def base(tmp_path) -> PreTrainedTokenizerFast:
    """Return a base model's tokenizer: a template of ChatML, but its EOS is <|endoftext|>."""
    made = tokenizer(CHATML)
    made.add_special_tokens({"eos_token": "<|endoftext|>"})
    return made


CHAT = [{"role": "user", "content": "1"}]


def test_the_end_of_turn_joins_the_stop_tokens_where_a_template_is_used(tmp_path, base):
    eos, end = base.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    joined = read_stops(config(tmp_path, CHAT), base)
    assert joined.token_ids == (eos, end) and joined.texts is None
    assert joined.told == (
        f"'<|im_end|>' ends a turn of the chat template, so it ends responses, too ({end}); the model's own stop tokens are "
        "'<|endoftext|>'"
    )
    assert joined.exported == (eos, end)
    for plain in (config(tmp_path, "1"), config(tmp_path, "1", chat_template=False)):
        assert read_stops(plain, base) == Stops((eos,), None, "")
    base.eos_token = "<|im_end|>"
    assert read_stops(config(tmp_path, CHAT), base) == Stops((end,), None, "")


def test_stops_of_the_configuration_are_texts_tokens_and_names_of_control_tokens(tmp_path, base):
    eos, end = base.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    stops = read_stops(config(tmp_path, "1", ["</ans>", 5, "<|im_end|>", "x"]), base)
    assert stops.token_ids == (eos, 5, end) and stops.texts.texts == ("</ans>", "x") and not stops.told
    with pytest.raises(
        ConfigError, match=r"rollout.stop has the token 9999, but the tokenizer has 265; give a smaller id"
    ):
        read_stops(config(tmp_path, "1", [9999]), base)
