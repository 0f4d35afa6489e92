"""Prompts as text and tokens: plain text in a template, or a chat rendered by a Jinja template.

Change here: how a row's prompt is rendered for the model. prompts.py reads the rows.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import current_thread, main_thread
from typing import TYPE_CHECKING, Any

import numpy as np

from dapo_mcore.config.data import DataConfig
from dapo_mcore.data.characters import LostCharacters
from dapo_mcore.errors import ConfigError, DataError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_CPU_S = 10.0
"""CPU time for rendering one prompt. A template that takes longer counts as endless."""
_MOST_CHARACTERS = 10_000_000


class PromptRenderer:
    """Renders prompts as one data section says. Raises ConfigError if the section does not fit the tokenizer.

    section  name of the section in messages: `data`, `eval.sets.aime24`, `warm_start.choose`.
    tools    OpenAI function schemas that a chat template declares in each prompt.
    A chat_template of null counts as false here: prompts.decide_template looks at the rows.
    `lost` collects the characters of the rendered texts that the tokenizer loses.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        section: str = "data",
        tools: Sequence[Mapping[str, Any]] = (),
    ):
        self.config = config
        self._tools = list(tools) or None
        self.tokenizer = tokenizer
        self.section = section
        self.lost = LostCharacters(tokenizer)
        self.template = _chat_template(config, tokenizer, section)
        _check_use(config, self.template, section)
        if config.add_bos and tokenizer.bos_token_id is None:
            raise ConfigError(
                f"{section}.add_bos is true, but the tokenizer has no BOS token; set {section}.add_bos false"
            )

    def render(self, prompt: Any, where: str) -> tuple[str, np.ndarray]:
        """Return the text and its token ids, int32 [T], T >= 1.

        `prompt` is text or a chat, a list of {role, content}. With a chat template, text becomes one user message.
        `where` names the row in errors. Raise DataError for any other type, a broken chat or a failing template, and
        ConfigError for a template that does not end.
        """
        if self.template is None:
            text, ids = self._render_plain(prompt, where)
        else:
            text, ids = self._render_chat(prompt, where)
        if not ids:
            raise DataError(f"{where}: the prompt has no tokens (text {text!r})")
        return text, np.asarray(ids, dtype=np.int32)

    def encode(self, text: str, where: str) -> list[int]:
        """Return the token ids of a text of row `where`, without adding special tokens.

        Raise DataError for a text that the tokenizer refuses, and for one of which it loses everything.
        """
        try:
            ids = self.tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # half a surrogate pair; an unknown word without an unknown token
            raise DataError(f"{where}: the text cannot be tokenized: {error}") from error
        self.lost.check(text, ids, where)
        return ids

    def fill_template(self, messages: list[dict[str, str]], tools: list[Mapping[str, Any]] | None) -> str:
        """Return the text of a chat up to the policy's next turn. Raise whatever the template raises."""
        return self.tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=True,
            **self.config.chat_template_kwargs,
        )

    def _render_plain(self, prompt: Any, where: str) -> tuple[str, list[int]]:
        if not isinstance(prompt, str):
            raise DataError(
                f"{where}: the prompt is a {type(prompt).__name__}, not text; set {self.section}.chat_template true for "
                f"chats of {{role, content}}, or name a text column in {self.section}.prompt_key"
            )
        text = self.config.prompt_template.replace("{prompt}", prompt)
        ids = self.encode(text, where)
        return text, [self.tokenizer.bos_token_id, *ids] if self.config.add_bos and ids else ids

    def _render_chat(self, prompt: Any, where: str) -> tuple[str, list[int]]:
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": self.config.prompt_template.replace("{prompt}", prompt)}]
        messages = _checked_messages(prompt, where)
        if self.config.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.config.system_prompt}, *messages]
        text = self._apply(messages, where)
        self._check_nothing_left_out(messages, text, where)
        # The template has already written the special tokens.
        return text, self.encode(text, where)

    def _apply(self, messages: list[dict[str, str]], where: str) -> str:
        try:
            with _cpu_limit(TEMPLATE_CPU_S):
                text = self.fill_template(messages, self._tools)
        except TimeoutError as error:
            raise ConfigError(
                f"{self.section}.chat_template has not ended after {TEMPLATE_CPU_S:g} s of CPU time on {where}; correct "
                f"its loops, or use another template"
            ) from error
        except Exception as error:  # a template is a program, and may fail in any way
            raise DataError(f"{where}: the chat template refused the prompt: {one_line(error)}") from error
        if len(text) > _MOST_CHARACTERS:
            raise DataError(
                f"{where}: the chat template made {len(text):,} characters of the prompt, more than {_MOST_CHARACTERS:,}; "
                f"correct {self.section}.chat_template or the row"
            )
        return text

    def _check_nothing_left_out(self, messages: list[dict[str, str]], text: str, where: str) -> None:
        """Raise DataError for a message that does not change the text: templates skip roles that they do not know.

        An earlier answer of the assistant may be left out: templates drop its reasoning.
        """
        for number, message in enumerate(messages):
            if message["role"] == "assistant" or message["content"].strip() in text:
                continue
            other = [*messages[:number], {**message, "content": "another text"}, *messages[number + 1 :]]
            if self._apply(other, where) == text:
                raise DataError(
                    f"{where}: the chat template leaves out message {number + 1}, whose role is {message['role']!r}; "
                    f"correct the role, or give a template that knows it in {self.section}.chat_template"
                )


@contextmanager
def _cpu_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after so much CPU time of this process. Works in the main thread only."""
    if current_thread() is not main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _chat_template(config: DataConfig, tokenizer: PreTrainedTokenizerBase, section: str) -> str | None:
    """Return the Jinja source, or None for plain text."""
    if not config.chat_template:
        return None
    stored = tokenizer.chat_template
    named = stored if isinstance(stored, Mapping) else {} if stored is None else {"default": stored}
    name = "default" if config.chat_template is True else config.chat_template
    if name in named:
        return named[name]
    if config.chat_template is not True:
        return _read_template(Path(name), section, sorted(named))
    if not named:
        raise ConfigError(
            f"{section}.chat_template is true (or null, and the first row has a chat), but the tokenizer has none; give the path of "
            "a Jinja file, or false"
        )
    raise ConfigError(
        f"{section}.chat_template is true, but none of the tokenizer's templates is named default; "
        f"set {section}.chat_template to one of {', '.join(sorted(named))}"
    )


def _check_use(config: DataConfig, template: str | None, section: str) -> None:
    """Raise ConfigError for settings that would change nothing: of chats for plain text, or variables unknown to the template.

    What `chat_template` says alone is a rule of the section; null may stand for either.
    """
    of_chats = {"system_prompt": config.system_prompt, "chat_template_kwargs": config.chat_template_kwargs}
    if template is None and (unused := [key for key, value in of_chats.items() if value]):
        raise ConfigError(
            f"{section}.{unused[0]} is for chats, but the prompts of {section} are plain text; set {section}.chat_template true, "
            "or leave it out"
        )
    if template is not None and config.add_bos:
        raise ConfigError(
            f"{section}.add_bos is for plain text, but the prompts of {section} are chats, whose template writes its own BOS; set "
            f"{section}.add_bos false"
        )
    for name in config.chat_template_kwargs:
        if re.search(rf"\b{re.escape(name)}\b", template) is None:
            raise ConfigError(
                f"{section}.chat_template_kwargs has {name}, which the chat template does not read; correct the name, or leave it out"
            )


def _read_template(path: Path, section: str, names: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        also = f", or one of the tokenizer's templates: {', '.join(names)}" if names else ""
        raise ConfigError(
            f"{section}.chat_template {str(path)!r} is not a file; give true, false or a Jinja file{also}"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{section}.chat_template {str(path)!r} cannot be read: {error}; give a Jinja file in UTF-8"
        ) from error


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
