"""An answer of /generate as a Rollout, or the reason why it may not be trained on.

Change here: what an answer must show before the trainer sees it. Nothing is repaired: a doubtful answer is dropped whole
and its prompt asked again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dapo_mcore.errors import RolloutError
from dapo_mcore.rollout.sglang.client.answer import Answer, Dropped
from dapo_mcore.types import Rollout

_UNUSED_POSITIONS = 2


@dataclass(frozen=True, slots=True)
class VersionRule:
    """Which weights may have made a sample.

    versions  every tag that this engine has given to weights, with its version.
    current   the tag of the newest of them.
    max_lag   versions a token may be behind those; 0 accepts `current` alone.
    """

    versions: Mapping[str, int]
    current: str
    max_lag: int = 0

    def accept(self, tag: str) -> int:
        """The version of a tag. Raises Dropped."""
        if tag not in self.versions:
            raise Dropped("unknown_version", f"weights {tag!r}, which this run did not send")
        version, newest = self.versions[tag], self.versions[self.current]
        if tag != self.current and newest - version not in range(1, self.max_lag + 1):
            raise Dropped("stale_version", f"weights {tag!r}, but {self.current!r} are current")
        return version


def read_reply(reply: Answer, rule: VersionRule, stop_token_ids: Collection[int]) -> Rollout:
    """The rollout in one answer. Raises Dropped.

    Tokens and log-probs come from `output_token_logprobs`, one list, so that they cannot be out of step. A response that
    ends with a stop token has ended by itself: SGLang up to 0.5.17 calls it cut where that is the last token allowed.
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
    if len({tag for _, tag in stretches}) > 1 and not rule.max_lag:
        raise Dropped("mixed_versions", f"weights changed at tokens {[start for start, _ in stretches[1:]]}")
    if rule.max_lag and not meta.get("weight_versions"):
        raise Dropped("unknown_version", "the answer does not tell which weights made which token")
    spans = tuple((start, rule.accept(tag)) for start, tag in stretches)
    return Rollout(
        token_ids=tokens,
        logprobs=logprobs,
        loss_mask=np.ones(len(tokens), dtype=bool),
        finish_reason="stop" if tokens[-1] in stop_token_ids else finish,
        weight_version=min(version for _, version in spans),
        version_spans=spans if len(spans) > 1 else (),
    )


def check_length(rollout: Rollout, num_prompt: int, max_new_tokens: int, context: int) -> None:
    """Nothing; raises RolloutError for a response that the server has cut before `max_new_tokens`: it does so, without a
    word, where its cache or its context holds no more. The last two positions of a context stay empty."""
    asked, got = min(max_new_tokens, context - num_prompt - _UNUSED_POSITIONS), len(rollout.token_ids)
    if rollout.truncated and got < asked:
        raise RolloutError(
            f"a server cut a response at {got} of rollout.max_response_tokens {max_new_tokens} tokens, after a prompt of "
            f"{num_prompt}: its KV cache or its context holds no more; give it more memory (rollout.sglang.server_args "
            "mem-fraction-static, max-total-tokens or context-length) or more GPUs (tensor_parallel), or lower "
            "rollout.max_response_tokens"
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
    """(first token, tag) of each stretch of tokens, from the spans where the version reports them."""
    spans = meta.get("weight_versions") or [{"start": 0, "end": num_tokens, "version": meta["weight_version"]}]
    starts, ends = [span["start"] for span in spans], [span["end"] for span in spans]
    if [0, *ends] != [*starts, num_tokens]:
        raise ValueError(f"weight_versions {spans} do not cover {num_tokens} tokens")
    return [(span["start"], str(span["version"])) for span in spans]
