"""The border between training and generation: weights cross it, and if both share GPUs, so does their memory.

Change here: when weights are synced, also if servers lose them while they generate; and the order in which trainer and servers
release and take memory. actor/memory.py and the engine move the memory itself. With rollout.sglang.colocated:

    servers generate ── release: all ──────────────→ actor takes everything back ── train
    actor's state to the host ── servers take their weights' memory ── sync
    actor's weights to the host ── servers take their KV cache ── generate
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial
from threading import Thread
from typing import Any, Literal, TypeVar

import torch

from dapo_mcore.actor.actor import Actor
from dapo_mcore.actor.memory import ActorMemory
from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.actor.weight_stream import ONE_LEADER, WeightStream
from dapo_mcore.errors import UpdateBroken
from dapo_mcore.types import (
    ColocatedEngine,
    ContinuousEngine,
    LeadingEngine,
    ReceivingEngine,
    RolloutEngine,
    SyncPeer,
)

T = TypeVar("T")
Weights = Callable[..., Iterator[tuple[str, torch.Tensor]]]
"""Starts a weight stream. Takes the `empty` of a ReceivingEngine."""
News = Literal["done", "weights lost"]
NUM_REPEATS = 2
"""Repeats of a broken sync: a third failure in a row is no accident."""
_LOOK_S = 0.2
_CANCEL_S = 5.0
"""Seconds that a cancelled action gets to end. It may be scoring samples, which is not cancelled."""


class Handover:
    """Weight syncs and, with `colocated`, turns on shared GPUs. Every rank calls its methods. Training comes first.

    engine       on rank 0, None elsewhere.
    peer         this rank's part in syncs besides sending its shards; None if it has none. Rank 0's part is the engine's.
    leaders      ranks that each get a part of the weight stream in a sync, see WeightStream; the same on every rank.
    colocated    actor and engine share GPUs. If not, both keep their memory, and only weights cross.
    run_interruptible  runs a function in the main thread and returns its result, or None if a signal asks the run to stop. See
                 process/signals.py.
    """

    def __init__(
        self,
        actor: Actor,
        engine: RolloutEngine | None,
        layout: Layout,
        *,
        colocated: bool,
        peer: SyncPeer | None = None,
        leaders: Sequence[int] = ONE_LEADER,
        run_interruptible: Callable[[Callable[[], Any]], Any] = lambda action: action(),
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.stream = WeightStream(actor.policy, actor.shape, layout)
        self._engine, self._peer, self._leaders, self._layout = engine, peer, leaders, layout
        self._memory = ActorMemory(actor) if colocated else None
        self._training, self._version = True, -1
        self._run_interruptible = run_interruptible
        self._clock, self._seconds = clock, 0.0
        self._num_weights_lost = 0

    def to_training(self) -> None:
        """Let the actor be used from here on, and the engine not. Does nothing if that is so already."""
        if self._memory is None or self._training:
            return
        with self._timed():
            self._take_devices()

    def to_rollout(self, version: int) -> None:
        """Give the engine the actor's weights as `version` and let it generate. If GPUs are shared, the actor must not be used
        any more.

        Raise RolloutError on every rank if no server takes the weights. Collective: see `sync_weights`.
        """
        self._version = version
        if self._memory is None:
            self._sync(version)
            return
        with self._timed():
            self._give_devices(version)
            if not self._resume():  # all servers died in training, and the weights that they missed are not kept
                self._take_devices()
                self._give_devices(version)
                self._on_engine(lambda engine: engine.resume())

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Let the actor be used in the block, to save or export it. Then the engine generates with the weights that it had."""
        self.to_training()
        yield
        if self._memory is not None:  # the servers have lost theirs
            self.to_rollout(self._version)

    def attend(self, action: Callable[[], T]) -> T | None:
        """Return what `action` returns, or None if a signal asks the run to stop. It may generate on rank 0, and must do
        nothing elsewhere. Raise on every rank what it raises on rank 0.

        If no server has the weights any more (for example, the only one was restarted), all ranks sync them again. Requests
        wait for that, so nothing that was generated is lost. For this, rank 0 runs the action in another thread.
        Collective: one gloo broadcast per sync and two at the end.
        """
        if not self._layout.is_controller:
            while self._layout.broadcast_object(None):
                self._sync_again()
            return self._layout.on_controller_or_raise(action)
        watches = isinstance(self._engine, ContinuousEngine)
        outcome = self._watched(action) if watches else _outcome(partial(self._run_interruptible, action))
        self._layout.broadcast_object(False)
        return self._layout.on_controller_or_raise(outcome.result)

    def pop_metrics(self) -> dict[str, float]:
        """Return `sync/weights_lost`, how often no server had the weights any more since the last call. If GPUs are shared,
        also `sync/handover_s`, the time that taking turns has cost besides the syncs."""
        counts, self._num_weights_lost = {"sync/weights_lost": float(self._num_weights_lost)}, 0
        seconds, self._seconds = self._seconds, 0.0
        return counts if self._memory is None else {**counts, "sync/handover_s": seconds}

    def _watched(self, action: Callable[[], T]) -> Future[T | None]:
        """Run the action in another thread and return its outcome. Meanwhile sync again whenever the weights are lost.

        Signals reach the main thread. `run_interruptible` covers only the waiting, so no sync is interrupted.
        """
        outcome: Future[T | None] = Future()
        thread = Thread(target=_run, args=(action, outcome), name="attended", daemon=True)
        try:
            news = self._run_interruptible(partial(self._start, thread, outcome))
            while news == "weights lost":
                self._layout.broadcast_object(True)
                self._sync_again()
                news = self._run_interruptible(partial(self._wait_for_news, outcome))
        except BaseException:
            self._engine.cancel_requests()
            raise
        if news == "done":
            return outcome
        self._engine.cancel_requests()
        if thread.ident is not None:
            thread.join(_CANCEL_S)
        return _outcome(lambda: None)

    def _start(self, thread: Thread, outcome: Future[Any]) -> News:
        thread.start()
        return self._wait_for_news(outcome)

    def _wait_for_news(self, outcome: Future[Any]) -> News:
        while not wait([outcome], _LOOK_S).done:
            if self._engine.weights_lost:
                return "weights lost"
        return "done"

    def _sync_again(self) -> None:
        self._num_weights_lost += 1
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
        sync = partial(sync_weights, self.stream, self._engine, version, self._peer, self._leaders)
        self._layout.on_controller_or_raise(sync)

    def _resume(self) -> bool:
        """Return False, on every rank, if no server generates but another sync would find some that are healthy again."""

        def resume(engine: ColocatedEngine) -> bool:
            try:
                engine.resume()
            except UpdateBroken:
                return False
            return True

        return self._layout.broadcast_object(self._on_engine(resume))

    def _on_engine(self, action: Callable[[ColocatedEngine], T]) -> T | None:
        return self._layout.on_controller_or_raise(lambda: action(self._engine) if self._engine is not None else None)


def sync_weights(
    stream: WeightStream,
    engine: RolloutEngine | None,
    version: int,
    peer: SyncPeer | None = None,
    leaders: Sequence[int] = ONE_LEADER,
) -> None:
    """Give the engine on rank 0 the actor's current weights as `version`. Every rank must call it, some with a `peer`.

    With several `leaders` the engine gets rank 0's part of the stream, and the peer of each other leader gets that rank's.

    Repeat up to NUM_REPEATS times if the engine says that another try may succeed. Raise other errors on rank 0.
    Collective: the stream's messages, what engine and peers exchange, and one broadcast per try over the control group.
    """
    problem: Exception | None = None
    weights = partial(stream, leaders=leaders)
    for repeats_left in reversed(range(1 + NUM_REPEATS)):
        problem = _take_part(weights, peer) if engine is None else _give(weights, engine, version)
        again = isinstance(problem, UpdateBroken) and repeats_left > 0
        if not stream.layout.broadcast_object(again):
            break
    if problem is not None:
        raise problem


def _take_part(weights: Weights, peer: SyncPeer | None) -> None:
    """Send this rank's shards once, and do what its peer does."""
    if peer is None:
        deque(weights(), maxlen=0)
    else:
        peer.serve(weights())


def _give(weights: Weights, engine: RolloutEngine, version: int) -> Exception | None:
    """Send the stream once. Return what went wrong at the engine, so that every rank can be told first."""
    stream = weights(engine.empty) if isinstance(engine, ReceivingEngine) else weights()
    problem = _outcome(lambda: engine.update_weights(stream, version)).exception()
    if isinstance(engine, LeadingEngine):
        problem = _outcome(engine.dismiss_peers).exception() or problem
    return problem


def _outcome(action: Callable[[], T]) -> Future[T]:
    """Call the action and return a future with its result or its exception."""
    outcome: Future[T] = Future()
    try:
        outcome.set_result(action())
    except Exception as error:
        outcome.set_exception(error)
    return outcome


def _run(action: Callable[[], T], outcome: Future[T]) -> None:
    try:
        outcome.set_result(action())
    except BaseException as error:  # whoever waits must learn of it, whatever it is
        outcome.set_exception(error)
