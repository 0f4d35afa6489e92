"""The reward function `by_source`: a rule for each data source, as verl's default reward has.

Change here: which rule a source has by default. The table is that of verl's utils/reward_score/__init__.py (b178a3c) without the
sources whose rules need other programs; `reward.by_source` comes before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from dapo_mcore.errors import DataError

if TYPE_CHECKING:  # workers import this module, and must not wait for torch
    from dapo_mcore.config.schema import Config
    from dapo_mcore.types import Prompt

TABLE = {
    "openai/gsm8k": "gsm8k",
    "lighteval/MATH": "math_boxed",
    "DigitalLearningGmbH/MATH-lighteval": "math_boxed",
    "HuggingFaceH4/MATH-500": "math_boxed",
    "math_dapo": "math_dapo",
    "math": "math_dapo",
    "math_dapo_reasoning": "math_dapo",
    "aime*": "math_dapo",
}
_OF_VERL = {
    "numina_*": "verl compares these with SymPy; math_verify is the nearest here",
    "searchR1_*": "verl compares the text of <answer>; give a function of your own",
    "hiyouga/geometry3k": "verl uses the package mathruler; give a function of your own",
    **dict.fromkeys(
        ("codecontests", "apps", "codeforces", "taco"), "verl runs the code; give a function that does so in a sandbox"
    ),
}
"""What to do about sources for which verl has a rule that is not here."""


def rule_for(source: str, table: Mapping[str, str]) -> str | None:
    """Return the function for a data source, None if there is none. The patterns of `table` come before TABLE's, in order."""
    patterns = [*table.items(), *TABLE.items()]
    return next((function for pattern, function in patterns if fnmatchcase(source, pattern)), None)


def check_sources(config: Config, sets: Mapping[str, Sequence[Prompt]]) -> list[str]:
    """Return a line for each set that is scored by source, with its rules and their numbers of prompts.

    sets  prompts by their section: `data`, `eval.sets.aime24`, `warm_start.choose`. Sets that are scored otherwise are skipped.
    Raise DataError for data sources without a rule.
    """
    lines, missing = [], []
    for section, prompts in sets.items():
        if _function_of(config, section) != "by_source":
            continue
        told = []
        for source, count in Counter(prompt.source for prompt in prompts).items():
            function = rule_for(source, config.reward.by_source)
            told.append(f"{source!r} by {function} ({count})")
            if function is None:
                hint = (
                    _hint(source) if source else f": these rows have no source; name its column in {section}.source_key"
                )
                missing.append(f"{source!r} ({count} of {len(prompts)} prompts of {section}{hint})")
        lines.append(f"{section}: scored by source, {', '.join(told)}")
    if missing:
        raise DataError(
            f"reward.function by_source has no rule for {', '.join(missing)}; name one for each in reward.by_source, for instance "
            "{'my_set*': math_verify}: gsm8k, math_boxed, math_dapo, math_verify or a function of your own; rows get their source "
            "from the column source_key"
        )
    return lines


def _function_of(config: Config, section: str) -> str:
    own = config.eval.sets.get(section.removeprefix("eval.sets.")) if section.startswith("eval.sets.") else None
    return own.reward_function if own and own.reward_function else config.reward.function


def _hint(source: str) -> str:
    hint = next((hint for pattern, hint in _OF_VERL.items() if fnmatchcase(source, pattern)), "")
    return hint and f": {hint}"
