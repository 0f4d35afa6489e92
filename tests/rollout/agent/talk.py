"""A byte-level tokenizer with a chat template like Qwen's, a policy whose turns are written down, and tools that a test defines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dapo_mcore.data.detokenize import decode_responses
from dapo_mcore.rollout.agent.call_format import CallFormat, CodeBlocks, ToolCallTags
from dapo_mcore.rollout.agent.episode import Dialect, Episode
from dapo_mcore.rollout.agent.tool_text import ToolText
from dapo_mcore.types import Rollout, SamplingParams, ToolCall

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
MERGES = [("`", "`"), ("``", "`"), ("```", "Ċ"), ("Ċ", "```"), ("<", "/"), ("a", "l"), ("al", "l"), ("l", ">")]
TEMPLATE = (
    "{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n<tools>' }}"
    "{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}{{- '\\n</tools><|im_end|>\\n' }}{%- endif %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'tool' %}{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}"
    "{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
BEFORE = "<|im_end|>\n<|im_start|>user\n<tool_response>\n"
AFTER = "\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
PROMPT = np.array([80, 81, 82], np.int32)


def make_tokenizer(tags: bool = True) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes and a few longer tokens; with `tags`, Qwen's tags are tokens that are not special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *("".join(pair) for pair in MERGES)]
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in CONTROL])
    if tags:
        backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in TAGS])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.chat_template = TEMPLATE
    return made


QWEN, BYTES = make_tokenizer(), make_tokenizer(tags=False)
EOS: int = QWEN.convert_tokens_to_ids("<|im_end|>")


def ids(text: str, tokenizer: Any = QWEN) -> list[int]:
    """Return the tokens of a text; names of control tokens in it are control tokens."""
    return tokenizer.encode(text, add_special_tokens=False)


def text_of(tokens: Sequence[int], tokenizer: Any = QWEN) -> str:
    return decode_responses(tokenizer, [np.array(tokens, np.int32)], skip_special_tokens=False)[0]


def tags_dialect(tokenizer: Any = QWEN, most: int = 200, max_turns: int = 4) -> Dialect:
    """Return how a policy talks that writes JSON in tags, in chats."""
    return dialect(ToolCallTags(), tokenizer, (BEFORE, AFTER), most, max_turns)


def blocks_dialect(tokenizer: Any = BYTES, most: int = 200, max_turns: int = 4) -> Dialect:
    """Return how a policy talks that writes code blocks in one text."""
    return dialect(CodeBlocks("python"), tokenizer, ("\n<interpreter>\n", "\n</interpreter>\n"), most, max_turns)


def dialect(form: CallFormat, tokenizer: Any, around: tuple[str, str], most: int, max_turns: int) -> Dialect:
    ends = frozenset(number for token, number in tokenizer.get_vocab().items() if form.end in token)
    return Dialect(
        format=form,
        tool_text=ToolText(tokenizer, *around, most=most, stops=(EOS,)),
        decode=lambda tokens: text_of(tokens, tokenizer),
        end_tokens=ends,
        max_turns=max_turns,
    )


def params(max_new_tokens: int = 400, seed: int = 3) -> SamplingParams:
    return SamplingParams(temperature=1.0, top_p=1.0, top_k=-1, max_new_tokens=max_new_tokens, seed=seed)


def piece(tokens: Sequence[int], finish: str = "stop", version: int = 1, seed: int | None = 7) -> Rollout:
    """Return what an engine makes of one request. The log-prob of token n is -n / 1000."""
    made = np.array(tokens, np.int32)
    return Rollout(made, -made.astype(np.float32) / 1000, np.ones(len(made), bool), finish, version, (), seed)


def stopped(tokens: Sequence[int], stops: Sequence[int], limit: int, version: int = 1) -> Rollout:
    """Return what an engine makes of a policy that would write `tokens`: it ends at a stop token or at the limit."""
    ends = [place + 1 for place, token in enumerate(tokens) if token in stops]
    length = min([*ends, len(tokens), limit])
    ended = length > 0 and tokens[length - 1] in stops
    return piece(tokens[:length], "stop" if ended else "length", version)


def play(
    talk: Dialect, turns: Sequence[Sequence[int]], outcome: Callable[[Any], ToolCall], law: SamplingParams
) -> tuple[Episode, list[np.ndarray]]:
    """Return an episode whose policy writes `turns`, and the inputs of its requests."""
    episode, asked, rest = Episode(PROMPT, law, talk), [], iter(turns)
    stops, left = {EOS, *talk.end_tokens}, list(next(rest))
    while episode.finish_reason is None:
        tokens, request = episode.request()
        asked.append(tokens)
        made = stopped(left, stops, request.max_new_tokens)
        left = left[len(made.token_ids) :]
        call = episode.take(made)
        if call is not None:
            episode.read(outcome(call))
            left = list(next(rest, []))
    return episode, asked


def ok(output: str = "2") -> Callable[[Any], ToolCall]:
    """Return what makes calls end well with this output, or badly if they have a problem."""

    def outcome(call: Any) -> ToolCall:
        if call.problem:
            return ToolCall(call.name, call.arguments, "error", call.problem, 0.0)
        return ToolCall(call.name, call.arguments, "ok", output, 0.5)

    return outcome


class Kind(StrEnum):
    OK, INFRASTRUCTURE = "ok", "infrastructure"


@dataclass(frozen=True)
class Result:
    kind: Kind
    text: str
    seconds: float = 0.5


@dataclass
class StubTools:
    """Tools whose calls end when a test says so, or at once with `answer`."""

    answer: Callable[[str, str], Result] | None = None
    calls: list[tuple[str, str, str]] = field(default_factory=list)
    begun: list[Future[Any]] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)

    def call(self, session: str, name: str, arguments: str, is_code: bool) -> Future[Any]:
        self.calls.append((session, name, arguments))
        future: Future[Any] = Future()
        self.begun.append(future)
        if self.answer is not None:
            future.set_result(self.answer(name, arguments))
        return future

    def close_session(self, session: str) -> Future[None]:
        self.closed.append(session)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def runs_of(mask: np.ndarray) -> Iterator[tuple[bool, int]]:
    """Yield (value, length) of each run of equal values."""
    edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(mask)]
    for start, end in pairwise(edges):
        yield bool(mask[start]), end - start
