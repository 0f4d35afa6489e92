"""Engines that answer a prompt with an episode: turns of the policy on another engine, and calls of tools between them.

Change here: how turns and calls of many episodes overlap. One episode is in episode.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import count
from typing import Any, Protocol

import numpy as np
import torch

from dapo_mcore.process.loop_thread import LoopThread, gather_all
from dapo_mcore.rollout.agent.call_format import Call
from dapo_mcore.rollout.agent.episode import Dialect, Episode
from dapo_mcore.types import ContinuousEngine, Rollout, RolloutEngine, SamplingParams, ToolCall


class Tools(Protocol):
    """The tools of a run, see tools/toolset.py. A session is one episode."""

    def call(self, session: str, name: str, arguments: str, is_code: bool) -> Future[Any]: ...
    def close_session(self, session: str) -> Future[None]: ...


class BatchEngine(RolloutEngine, Protocol):
    """An engine that generates one batch at a time, such as the embedded one."""

    def generate(
        self, prompts: Sequence[np.ndarray], params: SamplingParams, limits: Sequence[int] | None = None
    ) -> list[Rollout]: ...


class _ToolEngine:
    """What both engines have. `on_progress`, if set, is called with the number of episodes that have just ended."""

    def __init__(self, engine: RolloutEngine, tools: Tools, dialect: Dialect):
        self.on_progress: Callable[[int], None] | None = None
        self._engine, self._tools, self._dialect = engine, tools, dialect
        self._sessions = count()
        self._num_cut = 0

    @property
    def weight_version(self) -> int:
        return self._engine.weight_version

    def update_weights(self, weights: Iterator[tuple[str, torch.Tensor]], version: int) -> None:
        self._engine.update_weights(weights, version)

    def metrics(self) -> dict[str, float]:
        """Return the engine's metrics, and how many tokens were generated after the end of a call."""
        num_cut, self._num_cut = self._num_cut, 0
        return {**self._engine.metrics(), "rollout/tokens_cut": float(num_cut)}

    def close(self) -> None:
        """Close the engine. May be called twice."""
        self._engine.close()

    def _begin(self, call: Call, session: str) -> Future[Any] | None:
        """Start a call and return its future; None if the call has a problem."""
        return None if call.problem else self._tools.call(session, call.name, call.arguments, call.is_code)

    def _new_session(self) -> str:
        return f"episode {next(self._sessions)}"

    def _count(self, episode: Episode) -> None:
        """Count an episode that has ended."""
        self._num_cut += episode.num_cut
        if self.on_progress:
            self.on_progress(1)


class RoundToolEngine(_ToolEngine):
    """A types.RolloutEngine over one that generates one batch at a time.

    A round generates the next turn of all episodes, then makes all their calls at once, so that equal weights, seeds and outcomes of
    calls give equal rollouts.
    """

    _engine: BatchEngine

    def generate(self, prompts: Sequence[np.ndarray], params: SamplingParams) -> list[Rollout]:
        """Return one response for each entry of `prompts`, in order."""
        playing = [(self._new_session(), Episode(prompt, params, self._dialect)) for prompt in prompts]
        try:
            while waiting := [(session, episode) for session, episode in playing if episode.finish_reason is None]:
                self._play_turn(waiting)
        finally:
            for session, _ in playing:
                self._tools.close_session(session)
        return [episode.rollout() for _, episode in playing]

    def _play_turn(self, playing: Sequence[tuple[str, Episode]]) -> None:
        asked, params = zip(*(episode.request() for _, episode in playing))
        limits = [one.max_new_tokens for one in params]
        rollouts = self._engine.generate(asked, replace(params[0], max_new_tokens=max(limits)), limits)
        begun = [
            (episode, call, self._begin(call, session))
            for (session, episode), rollout in zip(playing, rollouts, strict=True)
            if (call := episode.take(rollout)) is not None
        ]
        for episode, call, result in begun:
            episode.read(_outcome(call, result and result.result()))
        for _, episode in playing:
            if episode.finish_reason is not None:
                self._count(episode)


class ContinuousToolEngine(_ToolEngine):
    """A types.ContinuousEngine over another. Episodes do not wait for each other, and calls run while others generate."""

    _engine: ContinuousEngine

    def __init__(self, engine: ContinuousEngine, tools: Tools, dialect: Dialect):
        super().__init__(engine, tools, dialect)
        self._loop = LoopThread("episodes")

    @property
    def weights_lost(self) -> bool:
        return self._engine.weights_lost

    def cancel_requests(self) -> None:
        """Cancel all requests and take no new ones: an episode ends with its next one."""
        self._engine.cancel_requests()

    def generate(self, prompts: Sequence[np.ndarray], params: SamplingParams) -> list[Rollout]:
        """Return one response for each entry of `prompts`, in order."""
        return self._loop.run(self._play_all(self._episodes(prompts, params)))

    def submit(self, prompts: Sequence[np.ndarray], params: SamplingParams) -> Future[list[Rollout]]:
        """Start one episode for each entry of `prompts` and return the future of their responses, in order."""
        return self._loop.submit(self._play_all(self._episodes(prompts, params)))

    def stop(self) -> None:
        """Cancel all episodes. The engine stays open."""
        self._loop.close()

    def close(self) -> None:
        self.stop()
        super().close()

    def _episodes(self, prompts: Sequence[np.ndarray], params: SamplingParams) -> list[Episode]:
        return [Episode(prompt, params, self._dialect, number) for number, prompt in enumerate(prompts)]

    async def _play_all(self, episodes: Sequence[Episode]) -> list[Rollout]:
        return await gather_all(map(self._play, episodes))

    async def _play(self, episode: Episode) -> Rollout:
        session = self._new_session()
        try:
            while episode.finish_reason is None:
                prompt, params = episode.request()
                (rollout,) = await asyncio.wrap_future(self._engine.submit([prompt], params))
                if (call := episode.take(rollout)) is not None:
                    result = self._begin(call, session)
                    episode.read(_outcome(call, result and await asyncio.wrap_future(result)))
        finally:
            self._tools.close_session(session)
        self._count(episode)
        return episode.rollout()


def _outcome(call: Call, result: Any) -> ToolCall:
    """Return the call with its tools/result.ToolResult; None if the call has a problem and was not made."""
    if result is None:
        return ToolCall(call.name, call.arguments, "error", call.problem, 0.0)
    return ToolCall(call.name, call.arguments, result.kind.value, result.text, result.seconds)
