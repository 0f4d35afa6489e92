"""Characters that a tokenizer loses: it gives them no token, or the unknown token.

Change here: when a character counts as lost. Prompts and demonstrations are both checked.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dapo_mcore.errors import DataError, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_IN_NO_TEXT = "\U0010ffff"
"""A noncharacter that is in no vocabulary: only byte-level tokenizers decode it again."""
_UNSEEN = ("Cc", "Cf", "Zs", "Zl", "Zp")
"""Unicode categories of control characters and spaces, which many tokenizers drop on purpose."""


class LostCharacters:
    """The characters of one data section that the tokenizer loses. Each distinct character is tried once.

    A character counts as lost in a text if it has no token of its own and is not in the decoded text. A character that
    the tokenizer replaces on purpose (lower case, normalised forms) has tokens and does not count as lost.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        probe = self._encode(_IN_NO_TEXT)
        survives = _IN_NO_TEXT in tokenizer.decode(probe)
        self._unknown = {tokenizer.unk_token_id, *(() if survives else probe)}
        self._tried: set[str] = set()
        self._doubtful: set[str] = set()
        self._lost: dict[str, None] = {}
        self._num_rows, self._first_row, self._last_row = 0, "", ""

    def check(self, text: str, token_ids: Sequence[int], row: str) -> None:
        """Record what `text` loses in `token_ids`. Raise DataError if only spaces are left of it.

        The texts of one row must be passed one after the other.
        """
        characters = set(text)
        if new := characters - self._tried:
            self._tried |= new
            self._doubtful.update(filter(self._is_doubtful, new))
        if not (doubtful := characters & self._doubtful):
            return
        decoded = self._tokenizer.decode([token for token in token_ids if token not in self._unknown])
        lost = sorted(doubtful - set(decoded), key=text.index)
        if lost and not decoded.strip():
            raise DataError(
                f"{row}: the tokenizer has no token for any character of the text {text!r:.80}; "
                "use a tokenizer that has its script, or correct the row"
            )
        if lost:
            self._lost.update(dict.fromkeys(lost))
            self._num_rows += row != self._last_row
            self._first_row, self._last_row = self._first_row or row, row

    def report(self, num_rows: int, what: str) -> str:
        """Return one line about the losses in `num_rows` rows of `what`, a section of the data; empty if there are none."""
        if not self._lost:
            return ""
        return (
            f"{self._num_rows} of {num_rows} {what} lose characters that the tokenizer has no token for: "
            f"{shortened(' '.join(self._lost), 60)} (first in {self._first_row}); the model never sees them: use a tokenizer "
            "that has them, or reword the rows"
        )

    def _is_doubtful(self, character: str) -> bool:
        """Return True if the character alone has no token, only the unknown token, or tokens of only some of its bytes."""
        if unicodedata.category(character) in _UNSEEN or character == "\ufffd":
            return False
        ids = self._encode(character)
        known = set(ids) - self._unknown
        return not known or self._tokenizer.unk_token_id in ids or "\ufffd" in self._tokenizer.decode(ids)

    def _encode(self, text: str) -> list[int]:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except (
            Exception
        ):  # a bare one from tokenizers, for a word out of the vocabulary where there is no unknown token
            return []
