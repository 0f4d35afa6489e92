"""Where a response ends: the model's own stop tokens, the chat template's end of turn, and `rollout.stop`.

Change here: what ends a response. Both engines end it there, in training, in evaluation and in a turn with tools. The token or text
that ended a response stays in it, so that its tokens are exactly those that were drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dapo_mcore.config.schema import Config
from dapo_mcore.data.chat import PromptRenderer
from dapo_mcore.data.detokenize import decode_responses
from dapo_mcore.data.prompts import decide_template
from dapo_mcore.errors import ConfigError
from dapo_mcore.model_files.hf_config import stop_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER = "answer 4711"
_CUT_CHARACTER = "\ufffd"
"""What a decoder writes for a part of a character."""
_MORE_TOKENS = 4
"""A character has at most so many tokens."""


class StopTexts:
    """Texts that end a response, wherever a token begins or ends in them.

    texts      in the order of `rollout.stop`.
    window     number of last tokens in which a text is looked for.
    may_end    bool [V], True for tokens that may complete a text. Only after these, tokens are decoded.
    tokenizer  content of tokenizer.json, for servers that must find the texts, too; empty if there is no such file.
    """

    def __init__(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase):
        self.texts = tuple(texts)
        self.window = max(len(text.encode()) for text in texts) + _MORE_TOKENS
        self._tokenizer = tokenizer
        singles = [np.array([token], np.int32) for token in range(max(tokenizer.get_vocab().values()) + 1)]
        alone = decode_responses(tokenizer, singles, skip_special_tokens=False)
        self.may_end = np.array([any(_may_complete(token, text) for text in self.texts) for token in alone])
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self.tokenizer = backend.to_str() if backend is not None else ""

    def ended(self, tails: Sequence[np.ndarray]) -> list[bool]:
        """Return for each of some responses whether a text is in its last tokens, int32 [at most window]."""
        decoded = decode_responses(self._tokenizer, tails, skip_special_tokens=False)
        return [any(text in tail for text in self.texts) for tail in decoded]

    def length(self, tokens: np.ndarray) -> int | None:
        """Return the number of tokens (int32 [T]) up to the one that completes the first text; None if there is no text."""
        known = np.minimum(tokens, len(self.may_end) - 1)  # a model may have more tokens than its tokenizer
        lengths = (np.flatnonzero(self.may_end[known]) + 1).tolist()
        if not lengths:
            return None
        ended = self.ended([tokens[max(0, length - self.window) : length] for length in lengths])
        return next((length for length, does in zip(lengths, ended) if does), None)


@dataclass(frozen=True, slots=True)
class Stops:
    """What ends a response.

    texts     None without any.
    told      a line about a token that joined by itself, or empty.
    exported  ids that an export names as stop tokens, because a token has joined; empty: as the model's own files say.
    """

    token_ids: tuple[int, ...]
    texts: StopTexts | None
    told: str
    exported: tuple[int, ...] = ()


def read_stops(config: Config, tokenizer: PreTrainedTokenizerBase) -> Stops:
    """Return what ends a response of a run. Raise ConfigError for a stop that the tokenizer does not have."""
    own = stop_token_ids(config.model, tokenizer)
    turn = end_of_turn(PromptRenderer(decide_template(config.data), tokenizer))
    joins = [] if turn is None or turn in own else [turn]
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    chosen = [added.get(stop, stop) if isinstance(stop, str) else stop for stop in config.rollout.stop]
    ids = [stop for stop in chosen if isinstance(stop, int)]
    for number in ids:
        if number >= len(tokenizer):
            raise ConfigError(
                f"rollout.stop has the token {number}, but the tokenizer has {len(tokenizer)}; give a smaller id, or a text"
            )
    texts = [stop for stop in chosen if isinstance(stop, str)]
    return Stops(
        tuple(dict.fromkeys([*own, *joins, *ids])),
        StopTexts(texts, tokenizer) if texts else None,
        _joins_line(tokenizer, joins[0], own) if joins else "",
        (*own, *joins) if joins else (),
    )


def _joins_line(tokenizer: PreTrainedTokenizerBase, turn: int, own: Sequence[int]) -> str:
    name, *names = map(repr, tokenizer.convert_ids_to_tokens([turn, *own]))
    return (
        f"{name} ends a turn of the chat template, so it ends responses, too ({turn}); the model's own stop tokens are "
        f"{', '.join(names)}"
    )


def end_of_turn(renderer: PromptRenderer) -> int | None:
    """Return the control token that a chat template writes after an assistant's answer; None without a template or such a token."""
    if renderer.template is None:
        return None
    chat = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": _ANSWER}]
    try:
        _, _, after = renderer.fill_template(chat, None).rpartition(_ANSWER)
    except Exception:  # a template is a program, and may refuse such a chat
        return None
    tokenizer = renderer.tokenizer
    first = tokenizer.encode(after.lstrip(), add_special_tokens=False)[:1]
    control = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    return first[0] if first and first[0] in control else None


def _may_complete(token: str, text: str) -> bool:
    """Return True if a text may end in a token, given as it is decoded alone, in which it may also begin."""
    if not token or (_CUT_CHARACTER in token and not text.isascii()):
        return True
    return text in token or any(token.startswith(text[start:]) for start in range(1, len(text)))
