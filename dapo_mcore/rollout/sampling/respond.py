"""Prompts to scored responses: generate, decode, score. Training and evaluation both go through here.

Change here: how an engine's rollouts and the reward function's scores become Samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import numpy as np

from dapo_mcore.errors import shortened
from dapo_mcore.observe.progress import NullProgress
from dapo_mcore.observe.timing import PhaseTimer
from dapo_mcore.rollout.sampling.scoring import Answer, ScoringQueue
from dapo_mcore.types import Group, Prompt, RewardFunction, Rollout, RolloutEngine, Sample, SamplingParams, Score

Decode = Callable[[Sequence[np.ndarray]], list[str]]
_LONGEST_REASON = 200


class Responder:
    """Answers prompts with an engine and scores the answers.

    decode    returns the texts of responses (int32 [T] each).
    progress  gets the phases `generate` and `reward`; `engine.on_progress = progress.advance` moves the first one.
    timer     is charged with the same two phases.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        reward: RewardFunction,
        decode: Decode,
        progress: NullProgress | None = None,
        timer: PhaseTimer | None = None,
    ):
        self._engine, self._reward, self._decode = engine, reward, decode
        self._progress, self._timer = progress or NullProgress(), timer or PhaseTimer()
        self._scoring = ScoringQueue(self._score)

    @property
    def weight_version(self) -> int:
        """The engine's weight version."""
        return self._engine.weight_version

    def groups(self, prompts: Sequence[Prompt], size: int, params: SamplingParams) -> list[Group]:
        """Return one group of `size` responses for each prompt, in order."""
        samples = self.samples([prompt for prompt in prompts for _ in range(size)], params)
        return [Group(prompt, tuple(samples[i * size : (i + 1) * size])) for i, prompt in enumerate(prompts)]

    def samples(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Sample]:
        """Return one scored response for each entry of `prompts`, in order; repeat a prompt to sample it again."""
        self._progress.phase("generate", total=len(prompts))
        with self._timer.phase("generate"):
            rollouts = self._engine.generate([prompt.token_ids for prompt in prompts], params)
        assert len(rollouts) == len(prompts), f"engine returned {len(rollouts)} rollouts for {len(prompts)} prompts"
        self._progress.phase("reward")
        with self._timer.phase("reward"):
            return self._score(prompts, rollouts)

    def submit(self, prompts: Sequence[Prompt], params: SamplingParams) -> Answer:
        """Start one response for each entry of `prompts` on a ContinuousEngine. Each is scored once it is generated."""
        self.expect(len(prompts))
        return self._scoring.follow(prompts, self._engine.submit([prompt.token_ids for prompt in prompts], params))

    def expect(self, count: int) -> None:
        """Show that `count` more responses are expected."""
        self._progress.more(count)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time and show the phase `generate` of the responses that are submitted in the block."""
        self._progress.phase("generate", total=0)
        with self._timer.phase("generate"):
            yield

    def waiting_for_scores(self) -> AbstractContextManager[None]:
        """Time the phase `reward`: nothing is generated in the block."""
        return self._timer.phase("reward")

    def _score(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[Sample]:
        """Return the rollouts of `prompts`, decoded and scored, in order. A rollout that cannot be trained on counts as failed."""
        texts = self._decode([rollout.token_ids for rollout in rollouts])
        turns = [self._turns(rollout, text) for rollout, text in zip(rollouts, texts)]
        scores = self._reward(prompts, rollouts, turns)
        assert len(scores) == len(prompts), f"reward returned {len(scores)} scores for {len(prompts)} samples"
        return [
            Sample(rollout, text, _checked(rollout, score)) for rollout, text, score in zip(rollouts, texts, scores)
        ]

    def _turns(self, rollout: Rollout, text: str) -> list[str]:
        """Return the texts that the policy wrote: an answer that a tool printed must not be scored."""
        return [text] if rollout.loss_mask.all() else self._decode(_written_spans(rollout))


def _written_spans(rollout: Rollout) -> list[np.ndarray]:
    """Return each run of tokens that the policy wrote, int32 [T]."""
    edges = np.flatnonzero(np.diff(rollout.loss_mask, prepend=False, append=False))
    return [rollout.token_ids[start:end] for start, end in edges.reshape(-1, 2)]


def _checked(rollout: Rollout, score: Score) -> Score:
    """Return the score, masked and with a failure if the rollout cannot be trained on."""
    failure = _failure(rollout)
    return score if failure is None else replace(score, acc=0.0, failure=failure, masked=True)


def _failure(rollout: Rollout) -> str | None:
    """Return why a rollout cannot be trained on through no fault of the policy, or None: a log-prob of its tokens that is not
    finite would spoil the mini-batch, and a response that lost a tool would look wrong."""
    logprobs = rollout.logprobs[rollout.loss_mask]
    if bad := np.count_nonzero(~np.isfinite(logprobs)):
        return f"log-probs: {bad} of {len(logprobs)} from the engine are not finite"
    lost = next((call for call in rollout.calls if call.kind == "infrastructure"), None)
    return lost and f"tool: {lost.name}: {shortened(lost.output, _LONGEST_REASON)}"
