"""Policies of which a token is the code of its letter: `(x)` calls the tool x, which is answered with `[…]`, and `.` ends a response.

An engine here writes what a script says, turn by turn. The script of a prompt is found by the prompt's first token.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from dapo_mcore.rollout.agent.call_format import Call
from dapo_mcore.rollout.agent.episode import Dialect
from dapo_mcore.types import Rollout, SamplingParams
from tests.rollout.agent.talk import stopped

END, STOP = ord(")"), ord(".")


class Letters:
    """`(x)` is a call of the tool x."""

    end = ")"

    def find(self, text: str) -> Call | None:
        _, begin, rest = text.partition("(")
        inside, end, _ = rest.partition(self.end)
        return Call(inside, "", closed=bool(end), problem="" if end else "not closed") if begin else None


class Brackets:
    """Writes an output as `[output]`, in the same turn."""

    ends_turn = False

    def encode(self, output: str, last: int) -> np.ndarray:
        return codes(f"[{output}]")


class Angles(Brackets):
    """Writes each output in three tokens that a tiny model has."""

    def encode(self, output: str, last: int) -> np.ndarray:
        return np.array([60, ord(output), 62], np.int32)


class FiveTokens:
    """Every five tokens are a call."""

    end = ""

    def find(self, text: str) -> Call | None:
        return Call("next", "", closed=len(text) >= 5) if text else None


def codes(text: str) -> np.ndarray:
    return np.array([*map(ord, text)], np.int32)


def spoken(tokens: Iterable[int]) -> str:
    return "".join(map(chr, tokens))


def letters_dialect(max_turns: int = 4) -> Dialect:
    return Dialect(Letters(), Brackets(), spoken, frozenset({END}), max_turns)


class ScriptedPolicy:
    """A batch engine. Response `r` of a prompt follows its script `r`: turns between `|`, the last script for all that follow."""

    weights_lost = False

    def __init__(self, scripts: dict[int, Sequence[str]], version: int = 1):
        self.weight_version, self.on_progress = version, None
        self.scripts = scripts
        self.rounds: list[tuple[list[str], list[int]]] = []
        self.responses: Counter[int] = Counter()
        self.turns: dict[tuple[int, str], str] = {}
        self.lock = threading.Lock()

    def generate(
        self, prompts: Sequence[np.ndarray], params: SamplingParams, limits: Sequence[int] | None = None
    ) -> list[Rollout]:
        limits = limits or [params.max_new_tokens] * len(prompts)
        assert max(limits) == params.max_new_tokens
        self.rounds.append(([spoken(prompt[1:]) for prompt in prompts], list(limits)))
        return [self.respond(prompt, limit) for prompt, limit in zip(prompts, limits)]

    def respond(self, tokens: np.ndarray, limit: int) -> Rollout:
        """Return the next turn of a response; the text so far says which."""
        prompt, so_far = int(tokens[0]), spoken(tokens[1:])
        with self.lock:
            if so_far:
                script = next(s for s in self.scripts[prompt] if so_far.startswith(s.split("|")[0]))
            else:
                script = self.scripts[prompt][min(self.responses[prompt], len(self.scripts[prompt]) - 1)]
                self.responses[prompt] += 1
        turn = script.split("|")[so_far.count("]")]
        return stopped(codes(turn).tolist(), {END, STOP}, limit, self.weight_version)

    def update_weights(self, weights: object, version: int) -> None:
        self.weight_version = version

    def metrics(self) -> dict[str, float]:
        return {"rollout/retries": 0.0}

    def close(self) -> None: ...


class ContinuousPolicy(ScriptedPolicy):
    """The same as a continuous engine, which answers in other threads; `hold` makes the requests that it names wait for `go`."""

    def __init__(
        self, scripts: dict[int, Sequence[str]], hold: Callable[[str], bool] = lambda text: False, version: int = 1
    ):
        super().__init__(scripts, version)
        self.hold, self.held, self.go = hold, threading.Semaphore(0), threading.Event()
        self.pool = ThreadPoolExecutor(16)
        self.cancelled = False
        self.params: list[SamplingParams] = []

    def submit(self, prompts: Sequence[np.ndarray], params: SamplingParams) -> Future[list[Rollout]]:
        self.params.append(params)
        return self.pool.submit(self._answer, prompts, params)

    def _answer(self, prompts: Sequence[np.ndarray], params: SamplingParams) -> list[Rollout]:
        (prompt,) = prompts
        if self.hold(spoken(prompt[1:])):
            self.held.release()
            assert self.go.wait(60)
        return [self.respond(prompt, params.max_new_tokens)]

    def cancel_requests(self) -> None:
        self.cancelled = True

    def close(self) -> None:
        self.go.set()
        self.pool.shutdown()
