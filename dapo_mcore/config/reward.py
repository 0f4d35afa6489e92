"""The section `reward`: how one response is scored.

Change here: what a user may set about rewards, its default, and a rule inside the section.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from dapo_mcore.config.values import FilePath, Seconds, Section, Tokens

_CANNOT_HANG = ("math_dapo", "gsm8k", "math_boxed")


FUNCTIONS = ("math_dapo", "gsm8k", "math_boxed", "math_verify", "by_source")
"""Words for reward functions of ours (reward/plugins.py)."""


class OverlongConfig(Section):
    """Soft overlong punishment (paper eq. 13) and overlong filtering."""

    penalty: bool = False
    """Soft punishment of long responses (paper section 3.4): over its last `cache` tokens the reward falls by up to `factor`."""
    max_length: Tokens | None = None
    """L_max in response tokens; None means rollout.max_response_tokens."""
    cache: Tokens = 4096
    """L_cache in tokens: the penalty grows from 0 to -factor over the last `cache` tokens."""
    factor: float = Field(1.0, gt=0, le=1000)
    """Largest punishment."""
    count_tool_output: bool = False
    """The penalty's length has the output of tools, too, as in verl: then a tool that prints much costs reward. False: only
    tokens that the policy wrote."""
    filter: bool = False
    """Mask the tokens of truncated responses out of the loss, with tools also of those that agent.max_turns has ended."""


class RewardConfig(Section):
    """Scoring of one response."""

    function: FilePath = "math_dapo"
    """`math_dapo`, `math_verify`, `gsm8k`, `math_boxed`, `by_source`, or an import path `package.module:function` /
    `path/to/file.py:function`. It returns a score, or a dict with `score`, perhaps `acc` and `pred` (the answer, for maj@k). The
    advantage is computed from the score. `acc`, or without it the score, held between 0 and 1, is the correctness that `reward/acc`,
    dynamic sampling and evaluations (mean@k) look at: give `acc` if the score has parts for something else, such as the form.

    `math_dapo` is the paper's rule, as in verl: the text after `Answer:` in normal form. It takes `Answer: 1, 2` for 12 and
    `Answer: 3 = 12`, too, and does not take `**Answer: 12**`, `\\(12\\)` and `12.0`, which chat models like to write.
    `math_verify` asks Hugging Face's grader, which compares values, where that rule says no (extra `math`).
    `gsm8k` and `math_boxed` are verl's rules for GSM8K (the number after `####`) and MATH (the last box, compared as text); they
    score 0 or 1. `by_source` takes the rule of the row's data source, as verl does where a script names no reward."""
    by_source: dict[str, FilePath] = Field(default_factory=dict)
    """Rules of data sources for function by_source, {pattern: function}; `*` stands for any text. The first pattern that fits
    counts, and the built-in ones of reward/by_source.py come last. A source without a rule is an error at the start."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """More arguments for an imported function, by name, as verl's reward_kwargs; of by_source each imported function gets them."""
    adapter: Literal["verl", "trl"] = "verl"
    """Calling convention of an imported function."""
    strict_box: bool = False
    """math_dapo only: compare the last \\boxed{} of the last 100 characters literally."""
    workers: int | None = Field(None, ge=0, le=10_000)
    """n > 0 scores in n processes with a deadline of timeout_seconds; 0 in the controller process without a deadline: a
    function that hangs then stops the run. null: 0 for built-in functions, which cannot hang, but 1 for math_verify and any other
    one."""
    placement: Literal["local", "ray"] = "local"
    """Where the worker processes run: on this machine, or on the nodes of the Ray cluster (section `ray`)."""
    timeout_seconds: Seconds = 30.0
    """Of one call of the reward function."""
    on_failure: Literal["mask", "value"] = "mask"
    """A sample whose scoring failed is left out of statistics and loss (`mask`), or its score is `failure_value`. It is counted
    in both cases. A step in which all scores failed ends the run."""
    failure_value: float = Field(-1.0, ge=-1000, le=1000)
    """Reward of a response whose reward function fails or takes too long."""
    filter_void: bool = False
    """Mask responses without an answer, and such without a token of the policy, out of the loss; they stay in the statistics
    (SimpleTIR, arXiv 2509.02479, against collapse with tools). The reward function must name answers (`pred`)."""
    overlong: OverlongConfig = OverlongConfig()

    @property
    def num_workers(self) -> int:
        """`workers` with its default filled in."""
        if self.workers is not None:
            return self.workers
        return int(any(function not in _CANNOT_HANG for function in self.functions))

    @property
    def functions(self) -> tuple[str, ...]:
        """The functions that may be called, without those of the built-in table of by_source."""
        return tuple(self.by_source.values()) if self.function == "by_source" else (self.function,)

    def for_function(self, function: str, kwargs: Mapping[str, Any] | None = None) -> RewardConfig:
        """Return the section with another function, or other kwargs of it, and without what belongs to its own.

        Raise ValidationError as it does.
        """
        if function == self.function and not kwargs:
            return self
        return RewardConfig.model_validate(
            {**self.model_dump(), "function": function, "strict_box": False, "kwargs": dict(kwargs or {})}
        )

    @model_validator(mode="after")
    def _check_fields(self) -> RewardConfig:
        if self.placement == "ray" and not self.num_workers:
            raise ValueError("placement ray needs workers of at least 1: 0 scores in the controller process")
        if "math_verify" in self.functions and not self.num_workers:
            raise ValueError(
                "function math_verify needs workers of at least 1: it may take for ever, and only they have a deadline"
            )
        if self.strict_box and self.function != "math_dapo":
            raise ValueError(f"strict_box is a form of function math_dapo, not of {self.function}; drop one of the two")
        for function in self.functions:
            if function not in FUNCTIONS and ":" not in function:
                raise ValueError(
                    f"function {function!r} is neither {', '.join(FUNCTIONS)} nor an import path; write package.module:function or "
                    "path/to/file.py:function"
                )
        if "by_source" in self.by_source.values():
            raise ValueError("by_source names itself as the rule of a source; name another function")
        self._check_kwargs()
        return self

    def _check_kwargs(self) -> None:
        if self.kwargs and not any(":" in function for function in self.functions):
            raise ValueError(
                f"kwargs are for imported functions, and {self.function} calls none; leave out {', '.join(self.kwargs)}"
            )
        try:
            json.dumps(self.kwargs)
        except (TypeError, ValueError) as error:
            raise ValueError(f"kwargs go to other processes as JSON: {error}; quote dates, for instance") from error
