"""Prompts from data files: columns picked, rows checked, duplicates removed, rendered to tokens, fitted to a length.

Change here: what a row must hold and what happens to one that does not fit. Formats are in rows.py, wording in chat.py.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dapo_mcore.config import DataConfig
from dapo_mcore.data.chat import PromptRenderer
from dapo_mcore.data.rows import Row, lookup, read_rows
from dapo_mcore.errors import ConfigError, DataError
from dapo_mcore.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The usable prompts of a data section, and what became of the rows.

    num_rows = len(prompts) + num_bad_rows + num_duplicates + num_dropped; truncated prompts are among the prompts.
    first_bad_row says where and why, or is empty.
    """

    name: str
    prompts: tuple[Prompt, ...]
    num_rows: int
    num_bad_rows: int
    num_duplicates: int
    num_truncated: int
    num_dropped: int
    first_bad_row: str = ""

    def describe(self) -> str:
        """One line for the log: `train: 960 rows gave 30 prompts (930 duplicates, 2 cut to the longest length)`."""
        fates = {
            "bad": self.num_bad_rows,
            "duplicates": self.num_duplicates,
            "too long and dropped": self.num_dropped,
            "cut on the left to the longest length": self.num_truncated,
        }
        told = ", ".join(f"{count} {fate}" for fate, count in fates.items() if count)
        line = f"{self.name}: {self.num_rows} rows gave {len(self.prompts)} prompts" + (f" ({told})" if told else "")
        return f"{line}; first bad row: {self.first_bad_row}" if self.first_bad_row else line


def load_prompts(config: DataConfig, tokenizer: PreTrainedTokenizerBase, name: str) -> PromptSet:
    """The prompts of `config.files`, in file order, with uid `name:row`; rows count from 0 over all files.

    With `limit`, reading stops once that many prompts are there. Raises DataError for an unreadable file, a bad row
    (unless on_bad_row is skip), a long prompt (when on_long_prompt is error) or no prompt at all; ConfigError for
    settings that cannot work, such as an answer_pattern without a group.
    """
    return _Loading(config, tokenizer, name).run()


class _Loading:
    """One pass over the files."""

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, name: str):
        self.config = config
        self.tokenizer = tokenizer
        self.name = name
        self.renderer = PromptRenderer(config, tokenizer)
        self.pattern = _compiled(config.answer_pattern)
        self.seen: set[bytes] = set()
        self.counts: Counter[str] = Counter()
        self.first_bad_row = ""

    def run(self) -> PromptSet:
        prompts: list[Prompt] = []
        for index, row in enumerate(read_rows(self.config.files)):
            self.counts["rows"] += 1
            prompt = self._prompt_or_none(index, row)
            if prompt is not None:
                prompts.append(prompt)
            if len(prompts) == self.config.limit:
                break
        result = PromptSet(
            self.name,
            tuple(prompts),
            num_rows=self.counts["rows"],
            num_bad_rows=self.counts["bad"],
            num_duplicates=self.counts["duplicates"],
            num_truncated=self.counts["truncated"],
            num_dropped=self.counts["dropped"],
            first_bad_row=self.first_bad_row,
        )
        if not prompts:
            raise DataError(f"no usable prompt in {', '.join(self.config.files)}: {result.describe()}")
        return result

    def _prompt_or_none(self, index: int, row: Row) -> Prompt | None:
        try:
            prompt, answer, source = self._columns(row)
            if self._is_duplicate(prompt, answer):
                return None
            text, token_ids = self.renderer.render(prompt, row.where)
        except DataError as error:
            if self.config.on_bad_row == "error":
                raise DataError(f"{error}; correct the row, or set data.on_bad_row skip") from error
            self.counts["bad"] += 1
            self.first_bad_row = self.first_bad_row or str(error)
            return None
        messages = prompt if isinstance(prompt, list) else None
        whole = Prompt(f"{self.name}:{index}", token_ids, text, answer, source, self._extra(row, answer), messages)
        return self._fitted(whole, row.where)

    def _columns(self, row: Row) -> tuple[Any, str, str]:
        """Prompt, answer and source. Raises DataError saying what the row lacks."""
        if row.columns is None:
            raise DataError(f"{row.where}: {row.problem}")
        prompt = _required(row, self.config.prompt_key, "prompt_key")
        answer = _as_answer(row, _required(row, self.config.answer_key, "answer_key"))
        if self.pattern is not None:
            answer = _last_match(row, self.pattern, answer)
        if not answer.strip():
            raise DataError(f"{row.where}: the answer is empty")
        return prompt, answer, self._source(row)

    def _source(self, row: Row) -> str:
        """Optional: plain files have no such column."""
        if self.config.source_key is None:
            return ""
        try:
            source = lookup(row.columns, self.config.source_key)
        except KeyError:
            return ""
        if source is not None and not isinstance(source, str):
            raise DataError(f"{row.where}: {self.config.source_key!r} must be text, got {source!r:.80}")
        return source or ""

    def _is_duplicate(self, prompt: Any, answer: str) -> bool:
        """Before rendering: the public DAPO parquet repeats each of its 17k prompts about 100 times."""
        if not self.config.deduplicate:
            return False
        content = json.dumps([prompt, answer], sort_keys=True, default=str).encode()
        digest = hashlib.blake2b(content, digest_size=16).digest()
        if digest in self.seen:
            self.counts["duplicates"] += 1
            return True
        self.seen.add(digest)
        return False

    def _extra(self, row: Row, answer: str) -> Mapping[str, Any]:
        """The columns for reward functions, the answer's in the form that answers are compared with."""
        columns = {key: value for key, value in row.columns.items() if key != self.config.prompt_key}
        return columns | {self.config.answer_key: answer} if self.config.answer_key in columns else columns

    def _fitted(self, prompt: Prompt, where: str) -> Prompt | None:
        length, longest = len(prompt.token_ids), self.config.max_prompt_tokens
        if length <= longest:
            return prompt
        if self.config.on_long_prompt == "error":
            raise DataError(
                f"{where}: the prompt has {length} tokens, but data.max_prompt_tokens is {longest}; "
                f"raise it, or set data.on_long_prompt truncate_left or drop"
            )
        if self.config.on_long_prompt == "drop":
            self.counts["dropped"] += 1
            return None
        self.counts["truncated"] += 1
        token_ids = prompt.token_ids[-longest:].copy()  # a view would keep the long prompt alive
        text = self.tokenizer.decode(token_ids.tolist())
        return replace(prompt, token_ids=token_ids, text=text)


def _compiled(pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"data.answer_pattern {pattern!r} is no regular expression: {error}") from error
    if compiled.groups < 1:
        raise ConfigError(
            f"data.answer_pattern {pattern!r} has no group; put parentheses around the answer: '#### (.+)'"
        )
    return compiled


def _required(row: Row, key: str, setting: str) -> Any:
    try:
        value = lookup(row.columns, key)
    except KeyError:
        keys = ", ".join(map(str, row.columns)) or "nothing"
        raise DataError(f"{row.where}: no {key!r}, the row has {keys}; name the column in data.{setting}") from None
    if value is None:
        raise DataError(f"{row.where}: {key!r} is null")
    return value


def _as_answer(row: Row, value: Any) -> str:
    """Text or an integer. A float is refused: 45.0 never equals the answer 45, and every response would be wrong."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"{row.where}: the answer must be text or an integer, got the {type(value).__name__} {value!r:.80}")


def _last_match(row: Row, pattern: re.Pattern[str], answer: str) -> str:
    """The first group of the last match, since worked solutions end with their answer."""
    matches = [match.group(1) for match in pattern.finditer(answer)]
    if not matches or matches[-1] is None:
        raise DataError(f"{row.where}: data.answer_pattern {pattern.pattern!r} does not occur in {answer[-80:]!r}")
    return matches[-1].strip()
