"""An engine and a reward without chance: a prompt's text says how its responses turn out, one letter per response.

`RW` answers right, then wrong, then repeats the last letter; `F` fails to score. Responses get longer with each sample, so the
overlong penalty varies inside every group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from dapo_mcore.config.schema import Config
from dapo_mcore.data.loader import PromptLoader
from dapo_mcore.rollout.sampling.sampler import Sampler
from dapo_mcore.types import Group, Prompt, Rollout, SamplingParams, Score

MIXED, RIGHT, WRONG = "RW", "RR", "WW"


class ThreadOfItsCaller:
    """Runs what a thread would, before `start` returns: for tests that decide what happens when."""

    def __init__(self, target: Callable[[], None], **options: object):
        self.start = target


class ScriptedEngine:
    """Response j to a prompt has j + 1 tokens; the last one is the letter of its script."""

    weights_lost = False

    def __init__(self, prompts: list[Prompt], version: int = 1):
        self.weight_version = version
        self.calls: list[tuple[int, SamplingParams]] = []
        self._scripts = {int(prompt.token_ids[0]): prompt.text for prompt in prompts}
        self._asked: dict[int, int] = defaultdict(int)

    def generate(self, prompts: list[np.ndarray], params: SamplingParams) -> list[Rollout]:
        self.calls.append((len(prompts), params))
        return [self.respond(int(prompt[0])) for prompt in prompts]

    def cancel_requests(self) -> None: ...

    def update_weights(self, weights: object, version: int) -> None: ...

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None: ...

    def respond(self, prompt: int) -> Rollout:
        """Return the next response to the prompt with this number."""
        script, index = self._scripts[prompt], self._asked[prompt]
        self._asked[prompt] += 1
        tokens = np.full(index + 1, ord(script[min(index, len(script) - 1)]), dtype=np.int32)
        logprobs = -np.arange(1, index + 2, dtype=np.float32) / 3
        return Rollout(tokens, logprobs, np.ones(index + 1, dtype=bool), "stop", self.weight_version)


def decode(responses: Sequence[np.ndarray]) -> list[str]:
    return ["".join(map(chr, token_ids)) for token_ids in responses]


def reward(prompts, rollouts, turns) -> list[Score]:
    return [_score(len(text), text[-1]) for (text,) in turns]


def _score(length: int, letter: str) -> Score:
    if letter == "F":
        return Score(reward=0.0, score=0.0, acc=False, failure="timeout", masked=True)
    raw, penalty = (1.0 if letter == "R" else -1.0), -0.1 * length
    return Score(reward=raw + penalty, score=raw, acc=letter == "R", penalty=penalty, pred=letter)


def make_prompts(*scripts: str) -> list[Prompt]:
    return [
        Prompt(f"train:{i}", np.array([i, 7], dtype=np.int32), script, "42", extra={"row": [i]})
        for i, script in enumerate(scripts)
    ]


def make_config(
    style: str,
    train: int,
    group_size: int = 2,
    seed: int = 0,
    engine: str = "embedded",
    keep_rollouts: bool = False,
    **sampling,
) -> Config:
    return Config.model_validate(
        {
            "seed": seed,
            "model": {"path": "unused"},
            "data": {"files": ["unused"]},
            "rollout": {
                "engine": engine,
                "group_size": group_size,
                "temperature": 0.9,
                "top_p": 0.8,
                "max_response_tokens": 64,
            },
            "sampling": {"style": style, "train_batch_prompts": train, **sampling},
            "batch": {"mini_batch_prompts": 1},
            "checkpoint": {"keep_rollouts": keep_rollouts},
            "algo": {"old_logprobs": "rollout"},
        }
    )


def make_sampler(prompts: list[Prompt], config: Config, **options) -> tuple[Sampler, ScriptedEngine]:
    engine = ScriptedEngine(prompts)
    return Sampler(engine, PromptLoader(prompts, seed=0, shuffle=False), reward, decode, config, **options), engine


def uids(groups: list[Group]) -> list[int]:
    return [int(group.prompt.uid.removeprefix("train:")) for group in groups]


def letters(group: Group) -> str:
    return "".join(sample.text[-1] for sample in group.samples)


def begun_by(version: int, rollout: Rollout) -> Rollout:
    """Return `rollout` as if all its tokens but the last had been made by the weights of `version`, if those are older."""
    if version >= rollout.weight_version:
        return rollout
    last = len(rollout.token_ids) - 1
    spans = ((0, version), (last, rollout.weight_version)) if last else ()
    return replace(rollout, weight_version=version, version_spans=spans)
