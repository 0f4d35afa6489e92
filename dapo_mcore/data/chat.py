"""A prompt as text and tokens: plain text in a template, or a chat through a Jinja template.

Change here: how a row's prompt is worded for the model. Rows are read in prompts.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from dapo_mcore.config import DataConfig
from dapo_mcore.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptRenderer:
    """Renders prompts by one data section. Raises ConfigError when the section and the tokenizer do not fit."""

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase):
        self.config = config
        self.tokenizer = tokenizer
        self.template = _chat_template(config, tokenizer)
        if config.add_bos and tokenizer.bos_token_id is None:
            raise ConfigError("data.add_bos is true, but the tokenizer has no BOS token; set data.add_bos false")
        if "{prompt}" not in config.prompt_template:
            raise ConfigError(f"data.prompt_template {config.prompt_template!r} does not contain {{prompt}}")

    def render(self, prompt: Any, where: str) -> tuple[str, np.ndarray]:
        """The text and its token ids, int32 [T], T >= 1.

        `prompt` is text or a chat, a list of {role, content}; text under a chat template becomes one user message.
        `where` names the row in errors. Raises DataError for any other type, a broken chat or a failing template.
        """
        if self.template is None:
            text, ids = self._render_plain(prompt, where)
        else:
            text, ids = self._render_chat(prompt, where)
        if not ids:
            raise DataError(f"{where}: the prompt has no tokens (text {text!r})")
        return text, np.asarray(ids, dtype=np.int32)

    def _render_plain(self, prompt: Any, where: str) -> tuple[str, list[int]]:
        if not isinstance(prompt, str):
            raise DataError(
                f"{where}: the prompt is a {type(prompt).__name__}, not text; "
                f"set data.chat_template true for chats of {{role, content}}, or name a text column in data.prompt_key"
            )
        text = self.config.prompt_template.replace("{prompt}", prompt)
        ids = self._encode(text, where)
        return text, [self.tokenizer.bos_token_id, *ids] if self.config.add_bos and ids else ids

    def _render_chat(self, prompt: Any, where: str) -> tuple[str, list[int]]:
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": self.config.prompt_template.replace("{prompt}", prompt)}]
        messages = _checked_messages(prompt, where)
        if self.config.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.config.system_prompt}, *messages]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=True
            )
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise DataError(f"{where}: the chat template refused the prompt: {error}") from error
        # The template has written every special token there should be.
        return text, self._encode(text, where)

    def _encode(self, text: str, where: str) -> list[int]:
        try:
            return self.tokenizer.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeError) as error:  # JSON can spell half a surrogate pair, which is no text
            raise DataError(f"{where}: the prompt cannot be tokenized: {error}") from error


def _chat_template(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The Jinja source, or None for plain text."""
    if config.chat_template is False:
        if config.system_prompt is not None:
            raise ConfigError("data.system_prompt needs a chat template; set data.chat_template, or drop the prompt")
        return None
    if config.add_bos:
        raise ConfigError("data.add_bos is for plain text; a chat template writes its own BOS: set data.add_bos false")
    if config.chat_template is True:
        if tokenizer.chat_template is None:
            raise ConfigError(
                "data.chat_template is true, but the tokenizer has none; give the path of a Jinja file, or false"
            )
        return tokenizer.get_chat_template()
    path = Path(config.chat_template)
    if not path.is_file():
        raise ConfigError(
            f"data.chat_template {config.chat_template!r} is not a file; give true, false or a Jinja file"
        )
    return path.read_text(encoding="utf-8")


def _checked_messages(prompt: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(prompt, list) or not prompt:
        raise DataError(f"{where}: the prompt must be text or a non-empty list of messages, got {prompt!r:.80}")
    for number, message in enumerate(prompt, start=1):
        if not isinstance(message, Mapping):
            raise DataError(f"{where}: message {number} must be {{role, content}}, got {message!r:.80}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise DataError(f"{where}: message {number} must have text under {key!r}, got {message.get(key)!r:.80}")
    if prompt[-1]["role"] == "assistant":
        raise DataError(f"{where}: the chat ends with an assistant message, so nothing is left to answer")
    return [dict(message) for message in prompt]
