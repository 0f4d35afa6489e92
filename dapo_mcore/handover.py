"""The border between training and generation: weights cross it, and where both share GPUs, so does their memory.

Change here: when weights are given, again where servers have lost them while they generated, and the order in which
trainer and servers give up and take memory. What is moved is actor/memory.py and the engine's business. With
rollout.sglang.colocated:

    servers generate ── release: all ──────────────→ actor takes everything back ── train
    actor's state to the host ── servers take their weights' memory ── sync
    actor's weights to the host ── servers take their KV cache ── generate
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Thread, current_thread, main_thread
from typing import TypeVar

from dapo_mcore.actor.actor import Actor
from dapo_mcore.actor.memory import ActorMemory
from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.actor.weight_stream import WeightStream
from dapo_mcore.errors import UpdateBroken
from dapo_mcore.types import ColocatedEngine, ContinuousEngine, ReceivingEngine, RolloutEngine

T = TypeVar("T")
REPEATS = 2
"""Of a sync that broke off: a third failure in a row is no accident."""


class Handover:
    """Every rank calls its methods. Training comes first. `engine` is rank 0's, None elsewhere.

    Without `colocated`, both sides keep their memory, and only weights cross. `uninterrupted` holds off what may interrupt
    the action of `attend`, while all ranks sync in the midst of it.
    """

    def __init__(
        self,
        actor: Actor,
        engine: RolloutEngine | None,
        layout: Layout,
        *,
        colocated: bool,
        uninterrupted: Callable[[], AbstractContextManager[None]] = nullcontext,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.stream = WeightStream(actor.policy, actor.shape, layout)
        self._engine, self._layout = engine, layout
        self._memory = ActorMemory(actor) if colocated else None
        self._training, self._version = True, -1
        self._uninterrupted = uninterrupted
        self._clock, self._seconds = clock, 0.0
        self._attending: Thread | None = None
        self._num_repeats = 0
        if isinstance(engine, ContinuousEngine):
            engine.on_starving = self._feed

    def to_training(self) -> None:
        """The actor may be used from here on, and the engine not. Does nothing when that is so already."""
        if self._memory is None or self._training:
            return
        with self._timed():
            self._take_devices()

    def to_rollout(self, version: int) -> None:
        """The engine has the actor's weights as `version` and may generate; where GPUs are shared, the actor may not be
        used any more."""
        self._version = version
        if self._memory is None:
            self._sync(version)
            return
        with self._timed():
            self._give_devices(version)
            if not self._resume():  # the only servers died in training, and what they missed is not kept
                self._take_devices()
                self._give_devices(version)
                self._on_engine(lambda engine: engine.resume())

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """The actor may be used inside, to save or export it; then the engine generates with the weights that it had."""
        self.to_training()
        yield
        if self._memory is not None:  # the servers have lost theirs
            self.to_rollout(self._version)

    def attend(self, action: Callable[[], T]) -> T:
        """What `action` returns, which generates on rank 0 and does nothing elsewhere. Raises on every rank what rank 0 raises.

        When no server has the weights any more (the only one died, say, and is back), every rank gives them again. Requests
        wait for that, so nothing that was generated is lost.
        """
        if self._layout.is_controller:
            return self._attended(action)
        while self._layout.broadcast_object(None):
            self._give_again()
        return self._layout.on_controller_or_raise(action)

    def pop_metrics(self) -> dict[str, float]:
        """`sync/weights_lost`, how often no server had the weights any more since the last call; where GPUs are shared also
        `sync/handover_s`, the time that this has cost, the syncs themselves aside."""
        counts, self._num_repeats = {"sync/weights_lost": float(self._num_repeats)}, 0
        seconds, self._seconds = self._seconds, 0.0
        return counts if self._memory is None else {**counts, "sync/handover_s": seconds}

    def _attended(self, action: Callable[[], T]) -> T:
        outcome: Future[T] = Future()
        self._attending = current_thread()
        try:
            outcome.set_result(action())
        except Exception as error:
            if self._attending is None:  # the others have heard, and wait no more
                raise
            outcome.set_exception(error)
        self._attending = None
        self._layout.broadcast_object(False)
        return self._layout.on_controller_or_raise(outcome.result)

    def _feed(self) -> None:
        """On rank 0. Only while the other ranks attend: a rollout beside training waits until they do."""
        assert self._attending or current_thread() is not main_thread(), "nobody would attend: generate inside `attend`"
        if self._attending is not current_thread():
            return
        with self._uninterrupted():
            self._attending = None
            self._layout.broadcast_object(True)
            self._give_again()
            self._attending = current_thread()

    def _give_again(self) -> None:
        self._num_repeats += 1
        self.to_training()
        self.to_rollout(self._version)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = self._clock()
        yield
        self._seconds += self._clock() - start

    def _take_devices(self) -> None:
        self._on_engine(lambda engine: engine.release())
        self._memory.onload()
        self._training = True

    def _give_devices(self, version: int) -> None:
        self._memory.offload_state()
        self._layout.barrier()  # servers take memory that other ranks have given up
        start = self._clock()
        self._sync(version)
        self._seconds -= self._clock() - start
        self._memory.offload_weights()
        self._layout.barrier()
        self._training = False

    def _sync(self, version: int) -> None:
        self._layout.on_controller_or_raise(lambda: sync_weights(self.stream, self._engine, version))

    def _resume(self) -> bool:
        """False, on every rank, when no server generates, but another sync would find some that are well again."""

        def resume(engine: ColocatedEngine) -> bool:
            try:
                engine.resume()
            except UpdateBroken:
                return False
            return True

        return self._layout.broadcast_object(self._on_engine(resume))

    def _on_engine(self, action: Callable[[ColocatedEngine], T]) -> T | None:
        return self._layout.on_controller_or_raise(lambda: action(self._engine) if self._engine is not None else None)


def sync_weights(stream: WeightStream, engine: RolloutEngine | None, version: int) -> None:
    """Gives the engine on rank 0 the actor's current weights as `version`. Every rank must call it.

    Repeated up to REPEATS times when the engine says that another try may succeed. Other errors are raised on rank 0.
    Collective: the stream's messages, and a broadcast over the control group.
    """
    problem: Exception | None = None
    for repeats_left in reversed(range(1 + REPEATS)):
        problem = _give(stream, engine, version)
        again = isinstance(problem, UpdateBroken) and repeats_left > 0
        if not stream.layout.broadcast_object(again):
            break
    if problem is not None:
        raise problem


def _give(stream: WeightStream, engine: RolloutEngine | None, version: int) -> Exception | None:
    """What went wrong at the engine, so that every rank can be told first."""
    if engine is None:
        deque(stream(), maxlen=0)
        return None
    try:
        engine.update_weights(stream(engine.empty) if isinstance(engine, ReceivingEngine) else stream(), version)
    except Exception as error:
        return error
    return None
