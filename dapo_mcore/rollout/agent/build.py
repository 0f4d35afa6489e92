"""The tools of a configuration, started, and how the policy calls them.

Change here: what a run with tools has beside its engine.
"""

from __future__ import annotations

import atexit
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from dapo_mcore.config.schema import Config
from dapo_mcore.data.detokenize import decode_responses
from dapo_mcore.data.prompts import decide_template
from dapo_mcore.data.stops import Stops
from dapo_mcore.rollout.agent.call_format import CodeBlocks, ToolCallTags
from dapo_mcore.rollout.agent.engine import ContinuousToolEngine, RoundToolEngine
from dapo_mcore.rollout.agent.episode import Dialect
from dapo_mcore.rollout.agent.tool_text import open_tool_text
from dapo_mcore.tools.toolset import ToolSet
from dapo_mcore.types import ContinuousEngine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class NullAgent:
    """A run without tools."""

    schemas: Sequence[Mapping[str, Any]] = ()
    end_tokens: Sequence[int] = ()

    def on(self, engine: Any) -> Any:
        """Return the engine that answers prompts."""
        return engine

    def close(self) -> None: ...


class Agent(NullAgent):
    """A run with tools, which are started.

    schemas     of the tools that chat templates declare in prompts.
    end_tokens  tokens at which the engine must stop, too: they may close a call.
    Raise ConfigError if the chat template cannot be used with tools, ToolError if a tool cannot be started.
    """

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, stops: Stops):
        self._tools = ToolSet(config.tools, config.ray.address)
        atexit.register(self.close)  # what is built after it may fail
        try:
            self._read(config.model_copy(update={"data": decide_template(config.data)}), tokenizer, stops)
        except BaseException:
            self.close()
            raise

    def _read(self, config: Config, tokenizer: PreTrainedTokenizerBase, stops: Stops) -> None:
        declares = config.agent.call_format == "tool_call" and config.agent.declare_tools
        self.schemas = self._tools.schemas if declares and config.data.chat_template is not False else ()
        form = ToolCallTags() if config.agent.call_format == "tool_call" else CodeBlocks(config.tools[0].name)
        self.end_tokens = [token for token in tokens_with(tokenizer, form.end) if token not in stops.token_ids]
        self._dialect = Dialect(
            format=form,
            tool_text=open_tool_text(config, tokenizer, self.schemas, stops.token_ids),
            decode=partial(_decode, tokenizer),
            end_tokens=frozenset(self.end_tokens),
            max_turns=config.agent.max_turns,
            **({"stop_length": stops.texts.length} if stops.texts else {}),
        )

    def on(self, engine: Any) -> ContinuousToolEngine | RoundToolEngine:
        kind = ContinuousToolEngine if isinstance(engine, ContinuousEngine) else RoundToolEngine
        return kind(engine, self._tools, self._dialect)

    def close(self) -> None:
        """End the tools. May be called twice."""
        self._tools.close()
        atexit.unregister(self.close)


def open_agent(config: Config, tokenizer: PreTrainedTokenizerBase, stops: Stops) -> NullAgent:
    """Start the tools that the configuration names. stops  what ends a response."""
    return Agent(config, tokenizer, stops) if config.tools else NullAgent()


def tokens_with(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of the vocabulary that contain an ASCII text, in order."""
    return sorted(number for token, number in tokenizer.get_vocab().items() if text in token)


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> str:
    return decode_responses(tokenizer, [tokens], skip_special_tokens=False)[0]
