"""One response with tools: the requests of its turns, and its tokens. No input and output, no clock.

Change here: when a turn or a response ends, and which tokens are trained on.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from dapo_mcore.rollout.agent.call_format import Call, CallFormat
from dapo_mcore.rollout.agent.tool_text import ToolText
from dapo_mcore.types import FinishReason, Rollout, SamplingParams, ToolCall

_MOST_REQUESTS = 64
"""Requests of one turn. A turn of more consists of ends of calls that were not begun."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """How the policy of a run and its tools talk.

    decode       returns the text of tokens, with control tokens.
    end_tokens   tokens with the whole text that closes a call. The engine stops at them; where no call was open, the turn goes on.
    max_turns    of the policy in one response.
    stop_length  returns the number of tokens of a turn up to the end of its first stop text, None without one. An engine sees the
                 tokens of one request only. A call that closes no later than the stop ends is made, and the response goes on.
    """

    format: CallFormat
    tool_text: ToolText
    decode: Callable[[np.ndarray], str]
    end_tokens: frozenset[int]
    max_turns: int
    stop_length: Callable[[np.ndarray], int | None] = lambda turn: None


class Episode:
    """A response that is being made. Until `finish_reason` is set, alternate:

        `request`  the next request of the engine
        `take`     its answer, which may contain a call
        `read`     the call's outcome

    prompt  int32 [T]
    params  of the response: `max_new_tokens` counts tokens of policy and tools, and each request has a seed of its own.

    The trained sequence is bit for bit what the engine saw: tokens are only appended to it. What the policy wrote after the end of a
    call is dropped before anything follows.
    """

    def __init__(self, prompt: np.ndarray, params: SamplingParams, dialect: Dialect, number: int = 0):
        self._prompt, self._params, self._dialect, self._number = prompt, params, dialect, number
        self._tokens = np.zeros(0, np.int32)
        self._logprobs, self._mask = np.zeros(0, np.float32), np.zeros(0, bool)
        self._spans: list[tuple[int, int]] = []
        self._turn_start = 0
        self._num_requests = self._num_of_turn = 0
        self._seed: int | None = None
        self._calls: list[ToolCall] = []
        self.num_turns = 1
        self.num_cut = 0
        self.finish_reason: FinishReason | None = None

    @property
    def room(self) -> int:
        """Number of tokens that may follow."""
        return self._params.max_new_tokens - len(self._tokens)

    def request(self) -> tuple[np.ndarray, SamplingParams]:
        """Return all tokens so far, int32 [T], and the parameters of the next request."""
        seed = request_seed(self._params.seed, self._number, self._num_requests)
        self._num_requests += 1
        self._num_of_turn += 1
        return np.concatenate([self._prompt, self._tokens]), replace(self._params, max_new_tokens=self.room, seed=seed)

    def take(self, rollout: Rollout) -> Call | None:
        """Append what the engine made. Return the call that it ends with, if its outcome can follow."""
        self._append(rollout)
        turn = self._tokens[self._turn_start :]
        call = self._dialect.format.find(self._dialect.decode(turn))
        closed = self._closing_length(turn) if call is not None and call.closed else None
        stop = self._dialect.stop_length(turn)
        if call is not None and closed is not None and (stop is None or closed <= stop):
            self._cut(self._turn_start + closed)
            return self._if_more_turns(call)
        if stop is not None:
            self._cut(self._turn_start + stop)
            self.finish_reason = "stop"
        elif rollout.finish_reason != "stop":
            self.finish_reason = rollout.finish_reason
        elif len(turn) and int(turn[-1]) in self._dialect.end_tokens:
            if not self.room or self._num_of_turn == _MOST_REQUESTS:
                self.finish_reason = "length"
        elif call is not None and self._dialect.tool_text.ends_turn:
            return self._if_more_turns(call)
        else:
            self.finish_reason = "stop"
        return None

    def read(self, call: ToolCall) -> None:
        """Append the outcome of a call and begin the next turn. Instead, the response ends if no token could follow the outcome, or
        if the tool failed through no fault of the policy."""
        self._calls.append(call)
        if call.kind == "infrastructure":
            self.finish_reason = "abort"
            return
        ids = self._dialect.tool_text.encode(call.output, int(self._tokens[-1]))
        if len(ids) >= self.room:
            self.finish_reason = "length"
            return
        self._extend(ids, np.zeros(len(ids), np.float32), np.zeros(len(ids), bool))
        self._turn_start, self._num_of_turn = len(self._tokens), 0
        self.num_turns += 1

    def rollout(self) -> Rollout:
        """Return the response, once it has ended."""
        assert self.finish_reason is not None
        return Rollout(
            token_ids=self._tokens,
            logprobs=self._logprobs,
            loss_mask=self._mask,
            finish_reason=self.finish_reason,
            weight_version=min(version for _, version in self._spans),
            version_spans=tuple(self._spans) if len(self._spans) > 1 else (),
            seed=self._seed,
            num_turns=self.num_turns,
            calls=tuple(self._calls),
        )

    def _if_more_turns(self, call: Call) -> Call | None:
        if self.num_turns < self._dialect.max_turns and self.room:
            return call
        self.finish_reason = "length"
        return None

    def _append(self, rollout: Rollout) -> None:
        start = len(self._tokens)
        self._seed = rollout.seed if self._num_requests == 1 else self._seed
        if len(rollout.token_ids) or not self._spans:
            for first, version in rollout.version_spans or ((0, rollout.weight_version),):
                if not self._spans or self._spans[-1][1] != version:
                    self._spans.append((start + first, version))
        self._extend(rollout.token_ids, rollout.logprobs, rollout.loss_mask)

    def _extend(self, tokens: np.ndarray, logprobs: np.ndarray, mask: np.ndarray) -> None:
        self._tokens = np.concatenate([self._tokens, tokens])
        self._logprobs = np.concatenate([self._logprobs, logprobs])
        self._mask = np.concatenate([self._mask, mask])

    def _closing_length(self, turn: np.ndarray) -> int:
        """Return the number of tokens of a turn up to the one that closes its call. The last of them stays whole."""

        def closes(length: int) -> bool:
            call = self._dialect.format.find(self._dialect.decode(turn[:length]))
            return call is not None and call.closed

        if not closes(len(turn) - 1):
            return len(turn)
        return bisect_left(range(len(turn)), True, key=closes)

    def _cut(self, length: int) -> None:
        self.num_cut += len(self._tokens) - length
        self._tokens, self._logprobs, self._mask = self._tokens[:length], self._logprobs[:length], self._mask[:length]
        self._spans = [(start, version) for start, version in self._spans if start < length]


def request_seed(seed: int, number: int, request: int) -> int:
    """Return the seed of a request of response `number`, from that of all responses of a call."""
    return int(np.random.SeedSequence([seed, number, request]).generate_state(1)[0])
