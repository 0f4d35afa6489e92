"""An answer of /generate as a Rollout, or the reason why the trainer must not use it.

Change here: which fields are read, how long an answer may be, and what it must show before it is trained on. Nothing is
repaired: a doubtful answer is dropped whole, and its prompt is sent again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypedDict, get_args

import msgspec
import numpy as np

from dapo_mcore.data.stops import StopTexts
from dapo_mcore.errors import RolloutError
from dapo_mcore.types import Rollout

DropReason = Literal["aborted", "stale_version", "mixed_versions", "unknown_version", "malformed"]
DROP_REASONS: tuple[str, ...] = get_args(DropReason)

_BYTES_PER_TOKEN = 256
"""Five times what a token takes: its log-prob in up to 25 characters, its id twice, and perhaps its text."""
_OTHER_BYTES = 1 << 20
_NUM_UNUSED_POSITIONS = 2
"""SGLang leaves the last two positions of a context empty."""


class Dropped(Exception):
    """An answer that must not be used. `reason` is the one that it is counted under."""

    def __init__(self, reason: DropReason, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class Entry(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One token of output_token_logprobs: [log-prob, id, text or null]. The text is not read."""

    logprob: float
    token: Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class MetaInfo(TypedDict, total=False):
    finish_reason: dict[str, Any]
    output_token_logprobs: list[Entry]
    weight_version: str
    weight_versions: list[dict[str, Any]] | None


class Answer(TypedDict, total=False):
    """The fields of an answer that are read; others are skipped. read_reply checks which must be there."""

    meta_info: MetaInfo
    output_ids: list[int]


# The standard library's decoder takes three times as long for a long answer, in the thread that also watches the servers.
_DECODER = msgspec.json.Decoder(Answer)


@dataclass(frozen=True, slots=True)
class VersionRule:
    """Which weights may have made a sample.

    versions  version by weight_version, of all weights that this engine has sent.
    current   the weight_version of the newest of them.
    max_lag   how many versions a token may be behind `current`; 0 accepts `current` alone.
    """

    versions: Mapping[str, int]
    current: str
    max_lag: int = 0

    def accept(self, weight_version: str) -> int:
        """Return the version of these weights. Raise Dropped if a sample must not be made by them."""
        if weight_version not in self.versions:
            raise Dropped("unknown_version", f"weights {weight_version!r}, which this run did not send")
        version, newest = self.versions[weight_version], self.versions[self.current]
        if weight_version != self.current and newest - version not in range(1, self.max_lag + 1):
            raise Dropped("stale_version", f"weights {weight_version!r}, but {self.current!r} are current")
        return version


def decode(raw: bytes | bytearray) -> Answer:
    """Return the answer's fields. Raise Dropped if `raw` is not JSON or a field has another type."""
    try:
        return _DECODER.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Dropped("malformed", f"{error} in an answer of /generate") from error


def max_answer_bytes(max_new_tokens: int) -> int:
    """Return a size that no answer of `max_new_tokens` tokens reaches, so a longer one would never end."""
    return _OTHER_BYTES + _BYTES_PER_TOKEN * max_new_tokens


def read_reply(reply: Answer, rule: VersionRule, stop_token_ids: Collection[int]) -> Rollout:
    """Return the answer's rollout. Raise Dropped if the trainer must not use it.

    Tokens and log-probs both come from `output_token_logprobs`, so they cannot differ in length or order. A response that
    ends with a stop token has finish_reason `stop`: SGLang up to 0.5.17 reports `length` if that is the last token allowed.
    """
    try:
        meta = reply["meta_info"]
        finish = meta["finish_reason"]["type"]
        if finish == "abort":
            raise Dropped("aborted", str(meta["finish_reason"].get("message", "")))
        entries = meta["output_token_logprobs"]
        tokens = np.array([entry.token for entry in entries], dtype=np.int32)
        logprobs = np.array([entry.logprob for entry in entries], dtype=np.float32)
        stretches = _stretches(meta, len(tokens))
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise Dropped("malformed", f"{error!r} in an answer of /generate") from error
    _check_tokens(reply, finish, tokens, logprobs)
    if len({weight_version for _, weight_version in stretches}) > 1 and not rule.max_lag:
        raise Dropped("mixed_versions", f"weights changed at tokens {[start for start, _ in stretches[1:]]}")
    if rule.max_lag and not meta.get("weight_versions"):
        raise Dropped("unknown_version", "the answer does not tell which weights made which token")
    spans = tuple((start, rule.accept(weight_version)) for start, weight_version in stretches)
    return Rollout(
        token_ids=tokens,
        logprobs=logprobs,
        loss_mask=np.ones(len(tokens), dtype=bool),
        finish_reason="stop" if tokens[-1] in stop_token_ids else finish,
        weight_version=min(version for _, version in spans),
        version_spans=spans if len(spans) > 1 else (),
    )


def cut_at_text(rollout: Rollout, texts: StopTexts | None) -> Rollout:
    """Return the rollout up to the token that completes its first stop text, with finish_reason stop; the rollout itself without one.

    A server looks for a text in about as many tokens as its own encoding of it has, so it may miss one that a policy spells in
    more.
    """
    length = texts and texts.length(rollout.token_ids)
    if length is None:
        return rollout
    spans = tuple(span for span in rollout.version_spans if span[0] < length)
    return replace(
        rollout,
        token_ids=rollout.token_ids[:length],
        logprobs=rollout.logprobs[:length],
        loss_mask=rollout.loss_mask[:length],
        finish_reason="stop",
        weight_version=min((version for _, version in spans), default=rollout.weight_version),
        version_spans=spans if len(spans) > 1 else (),
    )


def check_length(rollout: Rollout, num_prompt: int, max_new_tokens: int, context: int) -> None:
    """Raise RolloutError if the server cut the response before `max_new_tokens`.

    A server does so silently when its KV cache or its context is full.
    """
    asked = min(max_new_tokens, context - num_prompt - _NUM_UNUSED_POSITIONS)
    got = len(rollout.token_ids)
    if rollout.truncated and got < asked:
        raise RolloutError(
            f"a server cut a response at {got} of at most {max_new_tokens} tokens, after a prompt of {num_prompt}: its KV cache or "
            "its context holds no more; give it more memory (rollout.sglang.server_args mem-fraction-static, max-total-tokens or "
            "context-length) or more GPUs (tensor_parallel), or lower rollout.max_response_tokens, or that of the evaluation sets"
        )


def _check_tokens(reply: Any, finish: Any, tokens: np.ndarray, logprobs: np.ndarray) -> None:
    if finish not in ("stop", "length"):
        raise Dropped("malformed", f"finish reason {finish!r}")
    if not len(tokens):
        raise Dropped("malformed", "no tokens")
    if not np.isfinite(logprobs).all():
        raise Dropped("malformed", "a log-prob that is not finite")
    if "output_ids" in reply and not np.array_equal(tokens, reply["output_ids"]):
        raise Dropped("malformed", "output_ids differ from output_token_logprobs")


def _stretches(meta: Mapping[str, Any], num_tokens: int) -> list[tuple[int, str]]:
    """Return (first token, weight_version) of each stretch of tokens: one stretch if the server does not report spans."""
    spans = meta.get("weight_versions") or [{"start": 0, "end": num_tokens, "version": meta["weight_version"]}]
    starts, ends = [span["start"] for span in spans], [span["end"] for span in spans]
    if [0, *ends] != [*starts, num_tokens]:
        raise ValueError(f"weight_versions {spans} do not cover {num_tokens} tokens")
    return [(span["start"], str(span["version"])) for span in spans]
