"""All data of a run, read and checked against the model's positions and the micro-batch size before anything is built.

Change here: what a run reads at start, and what must fit. prompts.py and demonstrations.py check single rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dapo_mcore.config.data import DataConfig
from dapo_mcore.config.schema import Config
from dapo_mcore.data.demonstrations import Demonstration, load_demonstrations
from dapo_mcore.data.prompts import PromptSet, decide_template, load_prompts
from dapo_mcore.errors import DataError
from dapo_mcore.model_files.hf_config import max_positions

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class RunData:
    """Training prompts, evaluation sets by name, and the demonstrations and choose set of a warm start, if any.

    lost  line about characters of the demonstrations that the tokenizer loses, or empty; prompt sets have their own.
    """

    train: PromptSet
    evaluation: Mapping[str, PromptSet]
    demonstrations: tuple[Demonstration, ...] = ()
    choose: PromptSet | None = None
    lost: str = ""

    @property
    def prompt_sets(self) -> list[PromptSet]:
        """Return all sets of prompts, the training prompts first."""
        return [self.train, *self.evaluation.values(), *([self.choose] if self.choose else [])]

    def lines(self) -> list[str]:
        """Return the lines to show: one per set, and warnings."""
        told = [line for found in self.prompt_sets for line in (found.describe(), *found.warnings())]
        told += self._other_variables()
        return [*told, f"warning: {self.lost}"] if self.lost else told

    def _other_variables(self) -> list[str]:
        """Return a line for each set whose chats are rendered with other variables than those of training."""
        ours = self.train.config
        return [
            f"warning: {found.section}.chat_template_kwargs is {found.config.chat_template_kwargs}, but data.chat_template_kwargs is "
            f"{ours.chat_template_kwargs}; the same question is asked in two ways"
            for found in self.prompt_sets
            if ours.chat_template
            and found.config.chat_template
            and found.config.chat_template_kwargs != ours.chat_template_kwargs
        ]


def load_run_data(
    config: Config,
    hf_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    warm_start: bool = True,
    most: int | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> RunData:
    """Read all data that the configuration names; without the warm start's files if `warm_start` is False (on resume).

    most   read at most so many prompts per set and demonstrations: enough to find a mistake before a run.
    tools  schemas of tools that chat templates declare.
    Raise DataError, with file and row, for data that cannot be used or do not fit the model's positions or a
    micro-batch; ConfigError for settings that cannot work.
    """

    def prompts(section: DataConfig, name: str) -> PromptSet:
        limit = min(filter(None, (section.limit, most)), default=None)
        found = load_prompts(section.model_copy(update={"limit": limit}), tokenizer, name, tools)
        own = limit if limit == section.limit else None
        return replace(found, config=found.config.model_copy(update={"limit": own}))

    train = prompts(config.data, "data")
    evaluation = {name: prompts(section, f"eval.sets.{name}") for name, section in config.eval.sets.items()}
    data = RunData(train, evaluation)
    settings = config.warm_start
    if warm_start and settings is not None:
        choose = prompts(settings.choose, "warm_start.choose") if settings.choose else None
        decided = config.model_copy(update={"data": decide_template(config.data)})
        demonstrations, lost = load_demonstrations(decided, tokenizer, most, tools)
        data = RunData(train, evaluation, demonstrations, choose, lost)
    positions = max_positions(hf_config)
    check_lengths(data, config, positions)
    check_demonstration_lengths(data.demonstrations, config, positions)
    return data


def check_lengths(data: RunData, config: Config, positions: int) -> None:
    """Raise DataError, with file and row, for a prompt that exceeds the model's positions with the longest response of its set."""
    limits = {f"eval.sets.{name}": config.eval_response_limit(name) for name in config.eval.sets}
    of_training = "rollout.max_response_tokens", config.rollout.max_response_tokens
    for found in data.prompt_sets:
        check_prompt_lengths(found, *limits.get(found.section, of_training), positions)


def check_prompt_lengths(found: PromptSet, key: str, max_response_tokens: int, positions: int) -> None:
    """Raise DataError, with file and row, for a prompt that exceeds the model's positions with the longest response.

    key  the setting that limits the response.
    """
    room = positions - max_response_tokens
    too_long = [prompt for prompt in found.prompts if len(prompt.token_ids) > room]
    if not too_long:
        return
    first, longest = too_long[0], max(len(prompt.token_ids) for prompt in too_long)
    remedies = [f"lower {key} to {positions - longest}"] if longest < positions else []
    if room > 0:
        remedies.append(f"set {found.section}.max_prompt_tokens {room} with {found.section}.on_long_prompt drop")
    remedies.append("use a model with more positions")
    raise DataError(
        f"{first.row}: the prompt has {len(first.token_ids)} tokens; with {key} {max_response_tokens} "
        f"that is {len(first.token_ids) + max_response_tokens}, but the model has max_position_embeddings {positions} "
        f"({len(too_long)} of {len(found.prompts)} prompts of {found.section} are too long, the longest has {longest} "
        f"tokens); {', or '.join(remedies)}"
    )


def check_demonstration_lengths(demonstrations: Sequence[Demonstration], config: Config, positions: int) -> None:
    """Raise DataError, with file and row, for a demonstration that exceeds the model's positions or a micro-batch."""
    if not demonstrations:
        return
    longest = max(demonstrations, key=len)
    budget, context = config.batch.max_tokens, config.parallel.context_parallel
    has = f"{longest.row}: the demonstration has {len(longest)} tokens with its end, the longest of warm_start.files"
    if len(longest) > positions:
        raise DataError(f"{has}, but the model has max_position_embeddings {positions}; shorten or remove the row")
    if len(longest) > budget * context:
        raise DataError(
            f"{has}, but a micro-batch holds batch.max_tokens {budget} × context_parallel {context} = {budget * context}; "
            f"raise batch.max_tokens to {-(-len(longest) // context)}, or shorten the row"
        )
