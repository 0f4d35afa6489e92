"""Scores of responses, from the reward function's outcome, the overlong penalty and reward.on_failure.

Change here: how these are combined into a Score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from threading import Lock

from dapo_mcore.config.reward import RewardConfig
from dapo_mcore.config.schema import Config
from dapo_mcore.reward.attempt import Attempt, Outcome, joined, judged
from dapo_mcore.reward.overlong import soft_overlong_penalty
from dapo_mcore.reward.plugins import Rule, build_judge
from dapo_mcore.reward.pool import RewardPool
from dapo_mcore.reward.ray_pool import RayRewardPool
from dapo_mcore.types import Prompt, Rollout, Score


class Scorer:
    """A types.RewardFunction, built by build_reward. close() ends its workers."""

    def __init__(self, config: RewardConfig, max_response_tokens: int, ray_address: str | None = None):
        self.config = config
        self._max_length = config.overlong.max_length or max_response_tokens
        self._pool: RewardPool | RayRewardPool | None = None
        self._turn = Lock()  # an evaluation may begin while responses of the next step are scored
        rule = Rule.of(config)
        if config.placement == "ray":
            self._pool = RayRewardPool(config.num_workers, rule, config.timeout_seconds, ray_address)
        elif config.num_workers:
            self._pool = RewardPool(config.num_workers, rule, config.timeout_seconds)
        else:
            self._judge = build_judge(rule)

    def __call__(
        self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], turns: Sequence[Sequence[str]]
    ) -> list[Score]:
        """Return one Score per sample, in order. The three sequences have equal lengths. Calls of several threads take turns."""
        attempts = [_attempt(*one) for one in zip(prompts, rollouts, turns, strict=True)]
        outcomes = self.judge(attempts)
        return [
            self._score(outcome, self._length(rollout)) for outcome, rollout in zip(outcomes, rollouts, strict=True)
        ]

    def judge(self, attempts: Sequence[Attempt]) -> list[Outcome]:
        """Return what the reward function gives for each attempt, in order."""
        with self._turn:
            return self._pool.score(attempts) if self._pool else [judged(self._judge, one) for one in attempts]

    def close(self) -> None:
        """End the worker processes, if any. May be called twice."""
        if self._pool:
            self._pool.close()

    def _length(self, rollout: Rollout) -> int:
        """Return the number of tokens that the overlong penalty is for."""
        return len(rollout.token_ids) if self.config.overlong.count_tool_output else rollout.num_policy_tokens

    def _score(self, outcome: Outcome, length: int) -> Score:
        """Return the Score of an outcome. A failure gets failure_value, and with on_failure mask it is masked as well."""
        overlong, failed = self.config.overlong, outcome.failure is not None
        penalty = 0.0
        if overlong.penalty:
            penalty = soft_overlong_penalty(length, self._max_length, overlong.cache, overlong.factor)
        score = self.config.failure_value if failed else outcome.score
        return Score(
            reward=score + penalty,
            score=score,
            acc=0.0 if failed else outcome.acc,
            pred=outcome.pred,
            penalty=penalty,
            failure=outcome.failure,
            masked=failed and self.config.on_failure == "mask",
        )


def _attempt(prompt: Prompt, rollout: Rollout, turns: Sequence[str]) -> Attempt:
    return Attempt(
        prompt=prompt.text,
        response=joined(turns),
        answer=prompt.answer,
        source=prompt.source,
        extra=prompt.extra,
        token_ids=rollout.token_ids[rollout.loss_mask],
        messages=prompt.messages,
        transcript={
            "num_turns": rollout.num_turns,
            "turns": list(turns),
            "calls": [asdict(call) for call in rollout.calls],
        },
    )


def build_reward(config: RewardConfig, max_response_tokens: int, ray_address: str | None = None) -> Scorer:
    """Return the reward function of a run. Raise RewardError if it cannot be loaded.

    With 0 workers it runs in this process and has no timeout. With n > 0 it runs in n processes with timeout_seconds: on
    this machine, or with placement ray on the nodes of the cluster at ray_address (None: a cluster of this machine).
    """
    return Scorer(config, max_response_tokens, ray_address)


def build_set_rewards(config: Config) -> dict[str, Scorer]:
    """Return the reward functions of evaluation sets that have one of their own. Sets with the same function and kwargs share it.

    Raise RewardError as build_reward does; then none is left open.
    """
    sections = {name: config.set_reward(name) for name in config.set_functions}
    scorers: dict[str, Scorer] = {}
    try:
        for section in sections.values():
            key = section.model_dump_json()
            if key not in scorers:
                scorers[key] = build_reward(section, config.rollout.max_response_tokens, config.ray.address)
    except BaseException:
        for scorer in scorers.values():
            scorer.close()
        raise
    return {name: scorers[section.model_dump_json()] for name, section in sections.items()}
