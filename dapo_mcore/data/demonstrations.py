"""Demonstrations of a warm start: rows of prompt and response as tokens.

Change here: what a demonstration must have. warm_start.py trains the policy on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from dapo_mcore.config.schema import Config
from dapo_mcore.data.chat import PromptRenderer
from dapo_mcore.data.rows import Row, read_rows
from dapo_mcore.data.stops import end_of_turn
from dapo_mcore.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt and a response, int32 [T] each, the response with the token that ends it.

    That is the chat template's end of turn, as in an assistant's answer; without a template, or such a token, the end of the sequence.

    trained  bool [T], which tokens of the response the policy itself writes; the others are output of tools.
    row      `demos.jsonl row 3`.
    """

    prompt: np.ndarray
    response: np.ndarray
    trained: np.ndarray
    row: str

    def __len__(self) -> int:
        """Return the number of tokens of both."""
        return len(self.prompt) + len(self.response)


def load_demonstrations(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    most: int | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> tuple[tuple[Demonstration, ...], str]:
    """Return the rows of warm_start.files in order, and one line about characters that the tokenizer loses (or "").

    most   read only so many rows, but at least one batch. Prompts are rendered as the data section says.
    tools  schemas of tools that its chat template declares.
    Raise DataError for a bad row, and for fewer rows than warm_start.batch_size.
    """
    settings = config.warm_start
    assert settings is not None
    renderer = PromptRenderer(config.data, tokenizer, tools=tools)
    rows = islice(read_rows(settings.files), most and max(most, settings.batch_size))
    turn = end_of_turn(renderer)
    end = tokenizer.eos_token_id if turn is None else turn
    found = tuple(_demonstration(row, renderer, end) for row in rows)
    if len(found) < settings.batch_size:
        raise DataError(
            f"warm_start.files hold {len(found)} demonstrations, fewer than warm_start.batch_size {settings.batch_size}; "
            "add rows or lower the batch size"
        )
    return found, renderer.lost.report(len(found), "demonstrations of warm_start.files")


def _demonstration(row: Row, renderer: PromptRenderer, end: int) -> Demonstration:
    columns = row.columns or {}
    prompt, parts = columns.get("prompt"), _parts(columns.get("response"))
    if not prompt or not parts:
        has = row.problem or f"the row has {', '.join(map(str, columns)) or 'nothing'}"
        raise DataError(
            f"{row.where}: a demonstration needs `prompt`, and `response` as text or as an odd number of texts, in turn the "
            f"policy's and a tool's; {has:.400}"
        )
    _, prompt_ids = renderer.render(prompt, row.where)
    ids = [renderer.encode(part, row.where) for part in parts]
    ids[-1] = [*ids[-1], end]
    trained = np.repeat(np.arange(len(ids)) % 2 == 0, [len(part) for part in ids])
    return Demonstration(prompt_ids, np.concatenate(ids).astype(np.int32), trained, row.where)


def _parts(response: Any) -> list[str]:
    """Return the texts of a response, in turn the policy's and a tool's, or [] if it is none."""
    parts = [response] if isinstance(response, str) else response
    whole = isinstance(parts, list) and len(parts) % 2 == 1 and all(isinstance(part, str) for part in parts)
    return parts if whole else []
