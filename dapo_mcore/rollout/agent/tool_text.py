"""Tool output as tokens: plain text, between the tokens that the chat template or `agent.output_template` puts around it.

Change here: how a policy sees a tool's output. What the policy wrote is never encoded again: these tokens are appended to it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from dapo_mcore.config.agent import OUTPUT
from dapo_mcore.config.schema import Config
from dapo_mcore.data.chat import PromptRenderer
from dapo_mcore.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DEFAULT = {
    "tool_call": f"\n<tool_response>\n{OUTPUT}\n</tool_response>\n",
    "code_block": f"\n<interpreter>\n{OUTPUT}\n</interpreter>\n",
}
_REMEDY = (
    f"use a template that only appends to a chat, or set agent.output_template to the text around a tool's {OUTPUT}"
)
_NO_THOUGHT = re.compile(r"<think>\s*</think>\s*")
_USER = {"role": "user", "content": "a question"}


class ToolText:
    """Encodes tool outputs for one run.

    before, after  text around an output; control tokens in it are control tokens.
    most           tokens of one output; longer ones lose their middle.
    stops          tokens that end a response. If `before` begins with one of them, it ends the policy's turn in a chat.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, before: str, after: str, *, most: int, stops: Collection[int]
    ):
        self._plain = PlainText(tokenizer)
        self._before, self._after = _encode(tokenizer, before), _encode(tokenizer, after)
        self._most = most
        self.ends_turn = len(self._before) > 0 and int(self._before[0]) in stops

    def encode(self, output: str, last: int) -> np.ndarray:
        """Return the tokens that follow the policy's call, int32 [T].

        last  token of the turn. If it is the one that ends the turn, it is not repeated.
        """
        start = int(self.ends_turn and last == self._before[0])
        return np.concatenate([self._before[start:], self._shortened(self._plain.encode(output)), self._after])

    def _shortened(self, ids: np.ndarray) -> np.ndarray:
        if len(ids) <= self._most:
            return ids
        note = self._plain.encode(f"\n[{len(ids) - self._most} tokens left out]\n")
        kept = max(0, self._most - len(note))
        head = kept // 2
        return np.concatenate([ids[:head], note, ids[len(ids) - (kept - head) :]])[: self._most]


class PlainText:
    """Encodes text of which nothing becomes a control token: `<|im_end|>` in it is seven or so tokens of text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
        # some vocabularies have indentation among their added tokens
        named = {number: name for number, name in added.items() if len(name.strip()) > 1}
        self._control = np.array(sorted({*named, *tokenizer.all_special_ids}), np.int32)
        self._names = list(named.values())

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens, int32 [T]. Names of control tokens in the text are split into text."""
        text = text.encode(errors="replace").decode()
        ids = _encode(self._tokenizer, text)
        if not np.isin(ids, self._control).any():
            return ids
        ids = np.concatenate([_encode(self._tokenizer, part) for part in self._parts(text)])
        return ids[~np.isin(ids, self._control)]

    def _parts(self, text: str) -> list[str]:
        """Return the text, cut after the first character of each name of a control token."""
        cuts = [0, *(match.start() + 1 for match in self._any_name.finditer(text)), len(text)]
        return [text[start:end] for start, end in pairwise(cuts)]

    @cached_property
    def _any_name(self) -> re.Pattern[str]:
        # a lookahead also finds names that overlap
        return re.compile(f"(?={'|'.join(map(re.escape, self._names)) or '(?!)'})")


def open_tool_text(
    config: Config, tokenizer: PreTrainedTokenizerBase, schemas: Sequence[Mapping[str, Any]], stops: Collection[int]
) -> ToolText:
    """Return the run's encoder of tool outputs. Raise ConfigError if the chat template rewrites what it has rendered, or leaves out
    tools that it must declare.

    schemas  of these tools.
    """
    agent = config.agent
    renderer = PromptRenderer(config.data, tokenizer)
    if schemas:
        _check_declares(renderer, schemas)
    template = agent.output_template
    if template is None and (agent.call_format == "code_block" or config.data.chat_template is False):
        template = _DEFAULT[agent.call_format]
    if template is not None:
        before, _, after = template.partition(OUTPUT)
    else:
        before, after = _of_chat_template(renderer, schemas)
    return ToolText(tokenizer, before, after, most=agent.max_output_tokens, stops=stops)


def _of_chat_template(renderer: PromptRenderer, schemas: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Return the text between the policy's turn and a tool's output, and between the output and the next turn.

    Two turns with a tool are rendered, to see that the second only appends to the first. An empty thought that opens each turn
    (enable_thinking false) may be missing in earlier turns: the policy's own turns keep it, as it has read them.
    """
    start = _render(renderer, [_USER], schemas)
    thought = "a thought\n</think>\n\n" if start.rstrip().endswith("<think>") else ""
    once = _render(renderer, [_USER, *_turn(f"{thought}turn-1", "output-1")], schemas)
    more = [*_turn(f"{thought}turn-1", "output-1"), *_turn(f"{thought}turn-2", "output-2")]
    begin, _, rest = once.partition("turn-1")
    before, output, after = rest.partition("output-1")
    opening = start.removeprefix(begin) if _NO_THOUGHT.fullmatch(start.removeprefix(begin)) else ""
    if begin + opening != start + thought or not (before and output and after):
        raise _refusal(renderer, f"it does not append a tool's output to the policy's turn, but writes {once[-80:]!r}")
    if (
        _render(renderer, [_USER, *more], schemas)
        != f"{once.removesuffix(opening)}{thought}turn-2{before}output-2{after}"
    ):
        raise _refusal(renderer, "it rewrites an earlier turn when a later one is added")
    return before, after


def _turn(text: str, output: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}, {"role": "tool", "content": output}]


def _check_declares(renderer: PromptRenderer, schemas: Sequence[Mapping[str, Any]]) -> None:
    if _render(renderer, [_USER], schemas) == _render(renderer, [_USER], ()):
        raise ConfigError(
            f"{renderer.section}.chat_template does not declare tools, so the policy would not know of them; use a template that "
            f"does, or describe them in {renderer.section}.system_prompt and set agent.declare_tools false"
        )


def _render(renderer: PromptRenderer, messages: list[dict[str, str]], schemas: Sequence[Mapping[str, Any]]) -> str:
    try:
        return renderer.fill_template(messages, list(schemas) or None)
    except Exception as error:  # a template is a program, and may fail in any way
        raise _refusal(renderer, f"it refuses a tool's message: {' '.join(str(error).split())[:200]}") from error


def _refusal(renderer: PromptRenderer, problem: str) -> ConfigError:
    return ConfigError(f"{renderer.section}.chat_template cannot be used with tools: {problem}; {_REMEDY}")


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    return np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)
