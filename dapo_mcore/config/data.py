"""The sections about data: `data`, `eval` and `warm_start`.

Change here: what a user may set about prompts, evaluation sets and demonstrations, its default, and a rule inside one section.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dapo_mcore.config.values import (
    AnswerPattern,
    Count,
    FilePath,
    FilePaths,
    LearningRate,
    Name,
    PromptTemplate,
    Section,
    Seed,
    Steps,
    Text,
    Tokens,
)


class DataConfig(Section):
    """Training prompts: JSONL or parquet rows, rendered to tokens."""

    files: FilePaths
    prompt_key: str = "prompt"
    """A column with text, or with a chat: [{role, content}, …]."""
    answer_key: str = "reward_model.ground_truth"
    """A column name; dots descend into nested objects."""
    answer_pattern: AnswerPattern | None = None
    """Regular expression whose first group is the answer, for instance `#### (.+)` for GSM8K."""
    source_key: str | None = "data_source"
    """The column that reward functions dispatch on. Only the default one may be absent."""
    prompt_template: PromptTemplate = "{prompt}"
    """Text around a plain-text prompt; {prompt} is replaced."""
    chat_template: bool | FilePath = False
    """False: plain text. True: the tokenizer's template (`default` if it has several). Otherwise the name of one of its
    templates, or the path of a Jinja file."""
    system_prompt: Text | None = None
    add_bos: bool = False
    """Plain text only: put the tokenizer's BOS token first."""
    max_prompt_tokens: Tokens = 2048
    on_long_prompt: Literal["truncate_left", "drop", "error"] = "truncate_left"
    on_bad_row: Literal["error", "skip"] = "error"
    deduplicate: bool = True
    shuffle: bool = True
    limit: Steps | None = None

    @model_validator(mode="after")
    def _check_fields(self) -> DataConfig:
        if self.system_prompt is not None and self.chat_template is False:
            raise ValueError("system_prompt needs a chat template; set chat_template, or drop the prompt")
        if self.add_bos and self.chat_template is not False:
            raise ValueError("add_bos is for plain text; a chat template writes its own BOS: set add_bos false")
        return self


class EvalConfig(Section):
    """mean@k on held-out prompts, by the training rollout path."""

    sets: dict[Name, DataConfig] = Field(default_factory=dict)
    every: Steps = 5
    at_start: bool = True
    samples_per_prompt: Count = 8
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: Seed = 777


class WarmStartConfig(Section):
    """Supervised steps on demonstrations, through the same actor, before the first rollout step."""

    files: FilePaths
    """JSONL with `prompt` and `response`. A response with tools is a list of texts, in turn the policy's and a tool's with all that
    stands around it, as the policy reads it: ["<tool_call>…</tool_call>", "<tool_response>8</tool_response>", "Answer: 8"]. Only the
    policy's texts are trained on."""
    batch_size: Count = 128
    max_updates: Steps = 300
    lr: LearningRate = 3e-3
    warmup_updates: int = Field(20, ge=0, le=1_000_000_000)
    weight_decay: float = Field(0.01, ge=0, le=10)
    stop_at: float | None = Field(None, gt=0, le=1)
    """Stop once this pass rate is reached on `choose` (measured every `check_every` updates)."""
    check_every: Steps = 10
    choose: DataConfig | None = None
