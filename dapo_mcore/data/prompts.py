"""Prompts from data files: columns picked, rows checked, duplicates removed, rendered to tokens, fitted to a length.

Change here: what a row must have, and what happens to one that does not fit. rows.py reads files, chat.py renders.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dapo_mcore.config.data import DataConfig
from dapo_mcore.data.chat import PromptRenderer
from dapo_mcore.data.identity import numbered, prompt_uid
from dapo_mcore.data.rows import Row, lookup, read_rows
from dapo_mcore.errors import DataError
from dapo_mcore.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_CUT = {
    "truncate_left": ("on the left", "beginning"),
    "truncate_right": ("on the right", "end"),
    "truncate_middle": ("in the middle", "middle"),
}
"""Where each way of truncation cuts, and what a prompt loses."""
_LARGE_SHARE = 0.1
"""Share of rows from which on rows that do not fit cause a warning."""


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The usable prompts of a data section, and counts of what happened to its rows.

    section        name of the section in messages: `data`, `eval.sets.aime24`, `warm_start.choose`.
    num_rows       = len(prompts) + num_bad_rows + num_duplicates + num_dropped; truncated prompts are among the prompts.
    num_repeats    prompts that repeat an earlier row, which stay because deduplicate is false.
    longest        tokens of the longest prompt before truncation.
    first_bad_row  row and reason, or empty; first_conflict is the same for prompts with several answers.
    lost           line about characters that the tokenizer loses, or empty.
    """

    section: str
    config: DataConfig
    prompts: tuple[Prompt, ...]
    num_rows: int
    num_bad_rows: int
    num_duplicates: int
    num_truncated: int
    num_dropped: int
    num_conflicts: int
    longest: int
    num_repeats: int = 0
    first_bad_row: str = ""
    first_conflict: str = ""
    lost: str = ""

    def describe(self) -> str:
        """Return one line: `data: 960 rows gave 30 prompts (930 duplicates, 2 cut on the left to the longest length)`."""
        where, _ = _CUT.get(self.config.on_long_prompt, _CUT["truncate_left"])
        fates = {
            "bad": self.num_bad_rows,
            "duplicates": self.num_duplicates,
            "repeats of an earlier row, which stay": self.num_repeats,
            "too long and dropped": self.num_dropped,
            f"cut {where} to the longest length": self.num_truncated,
        }
        told = ", ".join(f"{count} {fate}" for fate, count in fates.items() if count)
        line = f"{self.section}: {self.num_rows} rows gave {len(self.prompts)} prompts" + (f" ({told})" if told else "")
        return f"{line}; first bad row: {self.first_bad_row}" if self.first_bad_row else line

    def warnings(self) -> list[str]:
        """Return warnings about probable mistakes in the data or in the section; usually none."""
        name, rendered = self.section, len(self.prompts) + self.num_dropped
        limit = f"longer than {name}.max_prompt_tokens {self.config.max_prompt_tokens} (the longest has {self.longest})"
        lines = []
        if self.num_bad_rows >= _LARGE_SHARE * self.num_rows > 0:
            lines.append(f"{self.num_bad_rows} of {self.num_rows} rows of {name} are unusable and left out")
        if self.num_truncated >= _LARGE_SHARE * rendered:
            lines.append(
                f"{self.num_truncated} of {rendered} prompts of {name} are {limit} and lose their {_CUT[self.config.on_long_prompt][1]}; "
                f"raise it, or set {name}.on_long_prompt drop"
            )
        if self.num_dropped >= _LARGE_SHARE * rendered:
            lines.append(f"{self.num_dropped} of {rendered} prompts of {name} are {limit} and left out; raise it")
        if self.num_conflicts:
            lines.append(
                f"{self.num_conflicts} prompts of {name} come with another answer than before, and each is asked with both; "
                f"the first: {self.first_conflict}; correct or remove one of the rows"
            )
        if self.config.prompt_template != DataConfig.model_fields["prompt_template"].default and all(
            prompt.messages for prompt in self.prompts
        ):
            lines.append(
                f"{name}.prompt_template has no effect: all prompts are chats, and it stands around plain text; leave it out"
            )
        if self.lost:
            lines.append(self.lost)
        if self.config.limit is not None and self.config.limit > len(self.prompts):
            lines.append(f"{name}.limit is {self.config.limit}, but there are only {len(self.prompts)} prompts")
        return [f"warning: {line}" for line in lines]


def load_prompts(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    section: str = "data",
    tools: Sequence[Mapping[str, Any]] = (),
) -> PromptSet:
    """Return the prompts of `config.files` in file order, each with a uid that depends on its content.

    tools  schemas of tools that chat templates declare.
    With `limit`, reading stops after that many prompts. Raise DataError for an unreadable file, a bad row (unless
    on_bad_row is skip), a long prompt (if on_long_prompt is error), no prompt at all, or if all prompts are truncated;
    ConfigError for settings that do not fit the tokenizer.
    """
    return _Loading(decide_template(config), tokenizer, section, tools).run()


def decide_template(config: DataConfig) -> DataConfig:
    """Return the section with true or false for a chat_template of null: whether the first row with a prompt has a chat.

    Raise DataError for a file that cannot be read.
    """
    if config.chat_template is not None:
        return config
    return config.model_copy(update={"chat_template": _begins_with_chat(config)})


def _begins_with_chat(config: DataConfig) -> bool:
    for row in read_rows(config.files):
        try:
            return isinstance(lookup(row.columns or {}, config.prompt_key), list)
        except KeyError:
            continue
    return False


class _Loading:
    """One pass over the files."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        section: str,
        tools: Sequence[Mapping[str, Any]],
    ):
        self.config = config
        self.tokenizer = tokenizer
        self.section = section
        self.renderer = PromptRenderer(config, tokenizer, section, tools)
        self.pattern = config.answer_pattern and re.compile(config.answer_pattern)
        self.answers: defaultdict[bytes, dict[str, str]] = defaultdict(dict)
        self.uids: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.longest = 0
        self.first_bad_row = self.first_conflict = ""

    def run(self) -> PromptSet:
        prompts: list[Prompt] = []
        for row in read_rows(self.config.files):
            self.counts["rows"] += 1
            prompt = self._prompt_or_none(row)
            if prompt is not None:
                prompts.append(prompt)
            if len(prompts) == self.config.limit:
                break
        result = PromptSet(
            self.section,
            self.config,
            tuple(prompts),
            num_rows=self.counts["rows"],
            num_bad_rows=self.counts["bad"],
            num_duplicates=self.counts["duplicates"],
            num_truncated=self.counts["truncated"],
            num_dropped=self.counts["dropped"],
            num_conflicts=self.counts["conflicts"],
            longest=self.longest,
            num_repeats=self.counts["repeats"],
            first_bad_row=self.first_bad_row,
            first_conflict=self.first_conflict,
            lost=self.renderer.lost.report(len(prompts) + self.counts["dropped"], f"prompts of {self.section}"),
        )
        self._check_something_left(result)
        return result

    def _check_something_left(self, result: PromptSet) -> None:
        name, longest = self.section, self.config.max_prompt_tokens
        remedy = f"raise {name}.max_prompt_tokens from {longest} to at most {self.longest}"
        if not result.prompts:
            how = f"; {remedy}" if result.num_dropped else ""
            raise DataError(f"no usable prompt in {', '.join(self.config.files)}: {result.describe()}{how}")
        if result.num_truncated == len(result.prompts):
            raise DataError(
                f"all {len(result.prompts)} prompts of {', '.join(self.config.files)} are longer than "
                f"{name}.max_prompt_tokens {longest}, so that each would lose its {_CUT[self.config.on_long_prompt][1]}; {remedy}, or "
                "shorten them"
            )

    def _prompt_or_none(self, row: Row) -> Prompt | None:
        try:
            prompt, answer, source = self._columns(row)
            if self._is_duplicate(prompt, answer, row.where):
                return None
            text, token_ids = self.renderer.render(prompt, row.where)
        except DataError as error:
            if self.config.on_bad_row == "error":
                if isinstance(error, MissingColumn) and self.counts["rows"] == 1:
                    raise  # other rows will lack it, too, and skipping them leaves none
                raise DataError(f"{error}; correct the row, or set {self.section}.on_bad_row skip") from error
            self.counts["bad"] += 1
            self.first_bad_row = self.first_bad_row or str(error)
            return None
        messages = prompt if isinstance(prompt, list) else None
        whole = Prompt("", token_ids, text, answer, source, self._extra(row, answer), messages, row.where)
        fitted = self._fitted(whole)
        return fitted and self._named(fitted)

    def _columns(self, row: Row) -> tuple[Any, str, str]:
        """Return prompt, answer and source. Raise DataError that says what the row lacks."""
        if row.columns is None:
            raise DataError(f"{row.where}: {row.problem}")
        prompt = _required(row, self.config.prompt_key, f"{self.section}.prompt_key")
        answer = _as_answer(row, _required(row, self.config.answer_key, f"{self.section}.answer_key"))
        if self.pattern is not None:
            answer = _last_match(row, self.pattern, answer, self.section)
        if not answer.strip():
            raise DataError(f"{row.where}: the answer is empty")
        return prompt, answer, self._source(row)

    def _source(self, row: Row) -> str:
        """Return the row's source. The default column may be missing, one that the user chose may not."""
        key = self.config.source_key
        if key is None:
            return ""
        try:
            source = lookup(row.columns, key)
        except KeyError:
            if key != DataConfig.model_fields["source_key"].default:
                raise _no_column(row, key, f"{self.section}.source_key") from None
            return ""
        if source is not None and not isinstance(source, str):
            raise DataError(f"{row.where}: {key!r} must be text, got {source!r:.80}")
        return source or ""

    def _is_duplicate(self, prompt: Any, answer: str, where: str) -> bool:
        """Return True if the row repeats an earlier one. The public DAPO parquet has each of 17k prompts about 100 times."""
        content = json.dumps(prompt, sort_keys=True, default=str).encode()
        rows = self.answers[hashlib.blake2b(content, digest_size=16).digest()]
        if answer in rows:
            self.counts["duplicates" if self.config.deduplicate else "repeats"] += 1
            return self.config.deduplicate
        if rows:
            other, there = next(iter(rows.items()))
            self.counts["conflicts"] += 1
            self.first_conflict = self.first_conflict or f"{where} says {answer!r:.80}, {there} says {other!r:.80}"
        rows[answer] = where
        return False

    def _extra(self, row: Row, answer: str) -> Mapping[str, Any]:
        """Return the columns for reward functions; the answer's column has the answer after answer_pattern."""
        columns = {key: value for key, value in row.columns.items() if key != self.config.prompt_key}
        return columns | {self.config.answer_key: answer} if self.config.answer_key in columns else columns

    def _fitted(self, prompt: Prompt) -> Prompt | None:
        length, longest = len(prompt.token_ids), self.config.max_prompt_tokens
        self.longest = max(self.longest, length)
        if length <= longest:
            return prompt
        if self.config.on_long_prompt == "error":
            raise DataError(
                f"{prompt.row}: the prompt has {length} tokens, but {self.section}.max_prompt_tokens is {longest}; "
                f"raise it, or set {self.section}.on_long_prompt drop or one of {', '.join(_CUT)}"
            )
        if self.config.on_long_prompt == "drop":
            self.counts["dropped"] += 1
            return None
        self.counts["truncated"] += 1
        token_ids = _cut(prompt.token_ids, longest, self.config.on_long_prompt)
        return replace(prompt, token_ids=token_ids, text=self.tokenizer.decode(token_ids.tolist()))

    def _named(self, prompt: Prompt) -> Prompt:
        """Return the prompt with its uid, which numbers prompts of equal content."""
        uid = prompt_uid(prompt)
        self.uids[uid] += 1
        return replace(prompt, uid=numbered(uid, self.uids[uid]))


def _cut(token_ids: np.ndarray, longest: int, how: str) -> np.ndarray:
    """Return `longest` of the tokens, as verl's data.truncation left, right or middle (utils/torch_functional.py, b178a3c).

    The result is a copy: a view would keep the long prompt alive.
    """
    first = {"truncate_left": 0, "truncate_right": longest, "truncate_middle": longest // 2}[how]
    return np.concatenate([token_ids[:first], token_ids[len(token_ids) - (longest - first) :]])


class MissingColumn(DataError):
    """A row lacks a column that the configuration names."""


def _required(row: Row, key: str, setting: str) -> Any:
    try:
        value = lookup(row.columns, key)
    except KeyError:
        raise _no_column(row, key, setting) from None
    if value is None:
        raise DataError(f"{row.where}: {key!r} is null")
    return value


def _no_column(row: Row, key: str, setting: str) -> MissingColumn:
    keys = ", ".join(map(str, row.columns)) or "nothing"
    remedy = f"name the column in {setting}"
    for name, value in row.columns.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping) and key in value[0]:
            remedy = f"the rows seem to be in its list {name}: write them one a line, jq -c '.{name}[]'"
    return MissingColumn(f"{row.where}: no {key!r}, the row has {keys:.400}; {remedy}")


def _as_answer(row: Row, value: Any) -> str:
    """Return text or an integer as text. Refuse a float: 45.0 never equals the answer 45, so all responses were wrong."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"{row.where}: the answer must be text or an integer, got the {type(value).__name__} {value!r:.80}")


def _last_match(row: Row, pattern: re.Pattern[str], answer: str, section: str) -> str:
    """Return the first group of the last match, because worked solutions end with their answer."""
    matches = [match.group(1) for match in pattern.finditer(answer)]
    if not matches or matches[-1] is None:
        raise DataError(f"{row.where}: {section}.answer_pattern {pattern.pattern!r} does not occur in {answer[-80:]!r}")
    return matches[-1].strip()
