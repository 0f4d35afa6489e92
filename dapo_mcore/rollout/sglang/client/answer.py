"""The JSON of /generate's answer in typed fields: decoded in C straight into what replies.py reads, or refused.

Change here: which fields are read, and how long an answer may be. The standard library's decoder takes three times as
long over a long answer, all of it in the thread that also watches the servers.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypedDict, get_args

import msgspec

DropReason = Literal["aborted", "stale_version", "mixed_versions", "unknown_version", "malformed"]
DROP_REASONS: tuple[str, ...] = get_args(DropReason)

_BYTES_A_TOKEN = 256
"""Five times what a token takes: its log-prob in up to 25 characters, its id twice, and perhaps its text."""
_BYTES_BESIDE = 1 << 20


class Dropped(Exception):
    """An answer that must not be used, with the reason it is counted under."""

    def __init__(self, reason: DropReason, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class Entry(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One token of output_token_logprobs: [log-prob, id, text or null], of which the text is not read."""

    logprob: float
    token: Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class MetaInfo(TypedDict, total=False):
    finish_reason: dict[str, Any]
    output_token_logprobs: list[Entry]
    weight_version: str
    weight_versions: list[dict[str, Any]] | None


class Answer(TypedDict, total=False):
    """Everything else in an answer is skipped. Which fields must be there, read_reply says."""

    meta_info: MetaInfo
    output_ids: list[int]


_DECODER = msgspec.json.Decoder(Answer)


def decode(raw: bytes | bytearray) -> Answer:
    """The answer in `raw`. Raises Dropped for what is no JSON, or of other types."""
    try:
        return _DECODER.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Dropped("malformed", f"{error} in an answer of /generate") from error


def longest(max_new_tokens: int) -> int:
    """Bytes that an answer of so many tokens never needs: what is longer has no end."""
    return _BYTES_BESIDE + _BYTES_A_TOKEN * max_new_tokens
