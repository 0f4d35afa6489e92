"""The sections about data: `data`, `eval` and `warm_start`.

Change here: what a user may set about prompts, evaluation sets and demonstrations, its default, and a rule inside one section.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

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
    TopK,
    TopP,
)

EvalTemperature = Annotated[float, Field(ge=0, le=100)]

_SET_BY_US = (
    *("messages", "conversation", "tools", "documents", "chat_template", "tokenize", "add_generation_prompt"),
    *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
)
"""Arguments of transformers' apply_chat_template."""


class DataConfig(Section):
    """Training prompts: rows of files, rendered to tokens."""

    files: FilePaths
    """One or several of: a file of JSONL or a JSON array (.jsonl, .json), CSV with a header (.csv, .tsv: every value is text), each also
    as .gz or .zst, parquet, or Arrow (.arrow); a folder, for the files of one format and split in it and below it, or
    one that `save_to_disk` of `datasets` wrote; a glob such as data/train-*.parquet; a split of a data set on the Hugging Face hub,
    hf://ORG/NAME[@REVISION][/CONFIG]:SPLIT, from the hub's cache with HF_HUB_OFFLINE=1 (needs the extra `datasets`)."""
    prompt_key: str = "prompt"
    """A column with text, or with a chat: [{role, content}, …]."""
    answer_key: str = "reward_model.ground_truth"
    """A column name; dots descend into nested objects."""
    answer_pattern: AnswerPattern | None = None
    """Regular expression whose first group is the answer, for instance `#### (.+)` for GSM8K."""
    source_key: str | None = "data_source"
    """The column that reward functions dispatch on. Only the default one may be absent."""
    prompt_template: PromptTemplate = "{prompt}"
    """Text around a plain-text prompt; {prompt} is replaced. With a chat template it becomes the user's message. Prompts that are
    chats stay as they are."""
    chat_template: bool | FilePath | None = None
    """null: true if the prompt of the first row is a chat, else false. False: plain text. True: the tokenizer's template (`default`
    if it has several). Otherwise the name of one of its templates, or the path of a Jinja file."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables for the chat template, for instance {enable_thinking: false}. Each section has its own; demonstrations and the
    output of tools are rendered with those of `data`."""
    system_prompt: Text | None = None
    """First message of every chat."""
    add_bos: bool = False
    """Plain text only: put the tokenizer's BOS token first."""
    max_prompt_tokens: Tokens = 2048
    """Longest prompt, with all that the template adds; on_long_prompt says what becomes of longer ones."""
    on_long_prompt: Literal["truncate_left", "truncate_right", "truncate_middle", "drop", "error"] = "truncate_left"
    """For a prompt of more than max_prompt_tokens. `truncate_left` removes its first tokens, `truncate_right` its last ones.
    `truncate_middle` keeps the first max_prompt_tokens // 2 and the last ones, as verl does."""
    on_bad_row: Literal["error", "skip"] = "error"
    """For a row without the columns, or that is no valid JSON. `skip` tells how many it left out."""
    deduplicate: bool = True
    """Leave out rows whose prompt and answer an earlier row has."""
    shuffle: bool = True
    """Draw prompts in a new order each epoch; false: in the order of the rows."""
    limit: Steps | None = None
    """Use only the first rows that are prompts; null: all."""

    @model_validator(mode="after")
    def _check_fields(self) -> DataConfig:
        if self.system_prompt is not None and self.chat_template is False:
            raise ValueError("system_prompt needs a chat template; set chat_template, or drop the prompt")
        if self.add_bos and self.chat_template:
            raise ValueError("add_bos is for plain text; a chat template writes its own BOS: set add_bos false")
        self._check_kwargs()
        return self

    def _check_kwargs(self) -> None:
        if self.chat_template_kwargs and self.chat_template is False:
            raise ValueError("chat_template_kwargs need a chat template; set chat_template, or leave them out")
        if taken := [key for key in self.chat_template_kwargs if key in _SET_BY_US]:
            raise ValueError(
                f"chat_template_kwargs has {taken[0]}, which the run sets itself; name variables of the template, such as "
                "enable_thinking"
            )


class EvalSetConfig(DataConfig):
    """One evaluation set. A null of these settings takes the one of `eval`."""

    deduplicate: bool = False
    """Leave out rows whose prompt and answer an earlier row has. False, because public sets repeat rows on purpose: AIME's 960
    rows are 30 problems × 32."""
    samples_per_prompt: Count | None = None
    """null: eval.samples_per_prompt."""
    temperature: EvalTemperature | None = None
    """null: eval.temperature."""
    top_p: TopP | None = None
    """null: eval.top_p."""
    top_k: TopK | None = None
    """null: eval.top_k."""
    max_response_tokens: Tokens | None = None
    """null: eval.max_response_tokens."""
    reward_function: FilePath | None = None
    """As reward.function, with the rest of the section `reward` but its `kwargs` and `strict_box`, and with as many workers of its own.
    null: reward.function."""
    reward_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the set's own reward_function, as reward.kwargs are of reward.function; they replace those."""

    @model_validator(mode="after")
    def _check_reward_kwargs(self) -> EvalSetConfig:
        if self.reward_kwargs and self.reward_function is None:
            raise ValueError(
                f"reward_kwargs ({', '.join(self.reward_kwargs)}) are for a function of the set's own; name it in reward_function, or "
                "leave them out: reward.kwargs go to reward.function on all sets"
            )
        return self


class EvalConfig(Section):
    """mean@k on held-out prompts, by the training rollout path."""

    sets: dict[Name, EvalSetConfig] = Field(default_factory=dict)
    """Name and files of each set, for instance {aime: {files: aime.parquet}}."""
    every: Steps | None = 5
    """Evaluate every this many rollout steps, and after the last one. null: only then and as `at_start` says."""
    at_start: bool = True
    """Evaluate before the first rollout step, too."""
    samples_per_prompt: Count = 8
    """The k of mean@k."""
    temperature: EvalTemperature = 1.0
    """0 is greedy."""
    top_p: TopP = 1.0
    """Nucleus sampling: draw from the most probable tokens that together have this probability; 1: from all."""
    top_k: TopK = -1
    """Draw from the k most probable tokens; -1: from all."""
    max_response_tokens: Tokens | None = None
    """null: rollout.max_response_tokens."""
    seed: Seed = 777
    """Of the drawing, the same at every evaluation."""

    def of(self, name: str) -> EvalSampling:
        """Return how the set `name` is sampled: its own settings, and those of `eval` where it has none."""
        own = self.sets.get(name)
        named = {key: getattr(own, key, None) for key in EvalSampling.__dataclass_fields__}
        return EvalSampling(**{key: getattr(self, key) if value is None else value for key, value in named.items()})


@dataclass(frozen=True, slots=True)
class EvalSampling:
    """How the responses of one evaluation set are sampled. max_response_tokens is None for rollout.max_response_tokens."""

    samples_per_prompt: int
    temperature: float
    top_p: float
    top_k: int
    max_response_tokens: int | None


class WarmStartConfig(Section):
    """Supervised steps on demonstrations, through the same actor, before the first rollout step."""

    files: FilePaths
    """JSONL with `prompt` and `response`. A response with tools is a list of texts, in turn the policy's and a tool's with all that
    stands around it, as the policy reads it: ["<tool_call>…</tool_call>", "<tool_response>8</tool_response>", "Answer: 8"]. Only the
    policy's texts are trained on."""
    batch_size: Count = 128
    """Demonstrations per update."""
    max_updates: Steps = 300
    """Updates, unless stop_at ends them earlier."""
    lr: LearningRate = 3e-3
    """Peak of the learning rate."""
    warmup_updates: int = Field(20, ge=0, le=1_000_000_000)
    """Updates in which the learning rate rises."""
    weight_decay: float = Field(0.01, ge=0, le=10)
    """As optimizer.weight_decay."""
    stop_at: float | None = Field(None, gt=0, le=1)
    """Stop once this pass rate is reached on `choose` (measured every `check_every` updates)."""
    check_every: Steps = 10
    """Updates between measurements on `choose`."""
    choose: DataConfig | None = None
