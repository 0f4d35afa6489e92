"""Why not one response of a first rollout step is right: the usual causes, with what the step shows of each.

Change here: which causes are told.
"""

from __future__ import annotations

from collections.abc import Sequence

from dapo_mcore.config.schema import Config
from dapo_mcore.reward.explain import shell_command
from dapo_mcore.types import Group, Sample

_LONGEST_TEXT = 300
"""Characters of a response in the command: as many as math_dapo and gsm8k look at."""


def why_none_right(groups: Sequence[Group], step: int, config: Config, num_cut_prompts: int) -> str:
    """Return one line of causes, "" if a response is right or none is scored.

    step             number of the rollout step.
    num_cut_prompts  training prompts that were cut to data.max_prompt_tokens.
    """
    pairs = [(group.prompt, sample) for group in groups for sample in group.samples if sample.scored]
    if not pairs or any(sample.score.right for _, sample in pairs):
        return ""
    causes = "; ".join(_causes([sample for _, sample in pairs], config, num_cut_prompts))
    shown = max(
        pairs, key=lambda pair: (bool(pair[1].text.strip()), not pair[1].rollout.truncated)
    )  # the first of equal ones
    prompt, sample = shown
    command = shell_command(config.reward, prompt.source, prompt.answer, sample.text[-_LONGEST_TEXT:])
    return (
        f"warning: none of the {len(pairs)} responses of rollout step {step} is right. {causes}. "
        f"Read {config.run_dir}/samples/step_{step:06d}.jsonl, and try one: {command}"
    )


def _causes(samples: Sequence[Sample], config: Config, num_cut_prompts: int) -> list[str]:
    limit = config.rollout.max_response_tokens
    causes = []
    if no_answer := sum(not sample.score.answered for sample in samples):
        causes.append(
            f"{no_answer} have no answer that {config.reward.function} finds: do the prompts ask for its form?"
        )
    if cut := sum(sample.rollout.truncated for sample in samples):
        causes.append(f"{cut} reach rollout.max_response_tokens {limit}: raise it, or set rollout.stop")
    if num_cut_prompts:
        longest = config.data.max_prompt_tokens
        causes.append(f"{num_cut_prompts} prompts are cut to data.max_prompt_tokens {longest}")
    return [*causes, "a chat model needs data.chat_template, a base model often plain text"]
