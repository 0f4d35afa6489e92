"""How servers change weights or memory together: a weight update, and the turns of servers that share GPUs with the trainer.

Change here: the steps that every server takes, and what they must show before they serve. How the weights themselves
travel is sync/. If a server fails a step, it leaves the transaction and is taken out; the others go on.

    update    pause_generation → resume_memory (weights) → [a sender of sync/ gives the weights] → confirm weight_version
              → compare checksums → continue_generation → serving
    release   pause_generation → release_memory (all)                       servers that share GPUs: the trainer's turn
    resume    resume_memory (all) → continue_generation → serving           after the update of the servers' turn
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from dapo_mcore.errors import RolloutError, UpdateBroken
from dapo_mcore.rollout.sglang.client.api import ALL_MEMORY, WEIGHT_MEMORY
from dapo_mcore.rollout.sglang.client.http import RequestFailed
from dapo_mcore.rollout.sglang.pool.server import GENERATING, RETURNING, PoolSettings, Server, ServerStates


class TakesOut(Protocol):
    """What an update needs of recovery.Recovery."""

    def take_out(self, server: Server, problem: str, failed_at: str | None = None) -> None: ...

    async def stop(self, server: Server, forgiven: bool = True) -> None: ...


@dataclass
class PoolWeights:
    """The weights that servers must hold to serve, and who may change them.

    version     their weight_version; None before the first update.
    lock        held while servers change weights or memory.
    awake       set while the servers may hold memory. Unset in the trainer's turn: then no server starts.
    updating    servers may be paused, and then look as if they hang.
    num_pauses  how often `updating` has begun.
    """

    version: str | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    awake: asyncio.Event = field(default_factory=asyncio.Event)
    updating: bool = False
    num_pauses: int = 0

    def __post_init__(self) -> None:
        self.awake.set()

    @asynccontextmanager
    async def pause(self) -> AsyncIterator[None]:
        """Hold the lock. Servers may be paused inside the block."""
        async with self.lock:
            self.updating, self.num_pauses = True, self.num_pauses + 1
            try:
                yield
            finally:
                self.updating = False

    async def confirm(self, server: Server) -> None:
        """Raise RequestFailed unless the server reports `version`; else note that it holds these weights."""
        reported = await server.client.weight_version()
        if reported != self.version:
            raise RequestFailed(f"{server.url} reports weights {reported!r} after it was given {self.version!r}")
        server.weight_version = self.version

    def assert_held(self, server: Server) -> None:
        """A server may serve only while it has confirmed the current weights."""
        assert server.weight_version == self.version, f"{server.url} holds {server.weight_version}, not {self.version}"


class Transaction:
    """Steps that servers take together.

    servers         those that have passed every step so far.
    pool            all servers, in order, whether or not they take part.
    weight_version  the weights that an update brings; None if the transaction brings none.
    num_broken      how many updates in a row reached no server before this one.
    """

    def __init__(
        self,
        servers: list[Server],
        weight_version: str | None,
        timeout_s: float,
        recovery: TakesOut,
        *,
        pool: Sequence[Server] = (),
        num_broken: int = 0,
    ):
        self.servers, self.pool = servers, pool
        self.weight_version, self.num_broken = weight_version, num_broken
        self._timeout_s, self._recovery = timeout_s, recovery

    async def each(self, step: str, action: Callable[[Server], Awaitable[None]]) -> None:
        """Take one step on every server at once. A server that fails leaves and is taken out."""
        await self.together(step, {(server,): action(server) for server in self.servers})

    async def together(self, step: str, works: Mapping[tuple[Server, ...], Awaitable[None]]) -> None:
        """Take one step on groups of servers at once. If a group's work fails, all its servers leave and are taken out."""
        limited = (asyncio.wait_for(work, self._timeout_s) for work in works.values())
        results = await asyncio.gather(*limited, return_exceptions=True)
        failed_at = f"weight update, {step}"
        for group, result in zip(works, results):
            if not isinstance(result, BaseException):
                for server in group:
                    server.forget_restarts(failed_at)
                continue
            if not isinstance(result, RolloutError | TimeoutError):
                raise result
            problem = str(result) or f"nothing within {self._timeout_s:g} s"
            for server in group:
                self.servers.remove(server)
                self._recovery.take_out(server, f"{failed_at}: {problem}", failed_at)


class Updates:
    """Weight updates and turns over all servers of a pool, one at a time."""

    def __init__(
        self,
        states: ServerStates,
        weights: PoolWeights,
        settings: PoolSettings,
        recovery: TakesOut,
        checksums: Checksums | None,
    ):
        self._states, self._weights, self._settings = states, weights, settings
        self._recovery, self._checksums = recovery, checksums

    @asynccontextmanager
    async def update(self, weight_version: str, num_broken: int) -> AsyncIterator[Transaction]:
        """Move all reachable servers to new weights, which the block must give to the transaction's servers.

        Afterwards at least one server serves, and every serving server has confirmed `weight_version`. Servers that share
        GPUs take memory for the weights only and serve from `resume` on. An error in the block breaks the update off: all
        servers in it are taken out. Raise RolloutError if no server is left: UpdateBroken if another update may find some.
        """
        mode = "retract" if self._settings.continues_requests else "abort"
        weights = self._weights
        async with weights.pause():
            previous, weights.version = weights.version, weight_version
            transaction = self.transaction(weight_version, num_broken)
            try:
                await transaction.each("pause", lambda s: s.client.pause_generation(mode))
                await transaction.each("take memory", lambda s: s.resume_memory(WEIGHT_MEMORY))
                yield transaction
                await transaction.each("confirm", weights.confirm)
                await self._compare(transaction)
                if weights.awake.is_set():
                    await self._continue(transaction)
            except BaseException:
                weights.version = previous
                for server in transaction.servers:
                    self._recovery.take_out(server, "the weight update was broken off")
                raise
        if weights.awake.is_set():
            await self._wait_for_a_server()

    async def release(self) -> None:
        """Make every server release its device memory, or stop it. None serves before `update` and `resume`."""
        async with self._weights.pause():
            self._weights.awake.clear()
            returning = self._states.having(*RETURNING)
            transaction = self.transaction(None)
            await transaction.each("pause", lambda s: s.client.pause_generation())
            await transaction.each("release memory", lambda s: s.release_memory())
            stopping = (self._recovery.stop(s, forgiven=s in returning) for s in self._states.having(*RETURNING))
            await asyncio.gather(*stopping)
            for server in transaction.servers:
                server.state = "waiting"

    async def resume(self) -> None:
        """Let the servers with the current weights take the rest of their memory and serve; start stopped ones again.

        Raise RolloutError if no server serves: UpdateBroken if another update may find some.
        """
        weights = self._weights
        async with weights.lock:
            transaction = self.transaction(weights.version)
            transaction.servers = [s for s in transaction.servers if s.weight_version == weights.version]
            await transaction.each("take memory", lambda s: s.resume_memory(ALL_MEMORY))
            await self._continue(transaction)
            weights.awake.set()
        await self._wait_for_a_server()

    def transaction(self, weight_version: str | None, num_broken: int = 0) -> Transaction:
        """Return a transaction over every server that can be reached."""
        for server in self._states.having("serving"):
            server.forget_restarts(GENERATING)
        servers = self._states.having("serving", "waiting")
        timeout_s, everybody = self._settings.step_timeout_s, self._states.servers
        return Transaction(servers, weight_version, timeout_s, self._recovery, pool=everybody, num_broken=num_broken)

    async def _continue(self, transaction: Transaction) -> None:
        await transaction.each("resume", lambda s: s.client.continue_generation())
        for server in transaction.servers:
            self._weights.assert_held(server)
            self._states.mark_serving(server)

    async def _compare(self, transaction: Transaction) -> None:
        if self._checksums is not None:
            await transaction.each("ask for checksums", self._checksums.ask)
            self._checksums.vote(transaction.servers)
            await transaction.each("compare checksums", self._checksums.compare)

    async def _wait_for_a_server(self) -> None:
        """Wait until at least one server serves, if all have failed but some may come back with the weights.

        Raise UpdateBroken if only another update can make a server serve, and RolloutError if none is left.
        """
        states = self._states
        await states.announce()
        async with states.changed:
            while not states.having("serving") and self._may_return():
                await states.changed.wait()
        if not states.having("serving"):
            problem = UpdateBroken if states.having("waiting") else RolloutError
            raise problem(states.describe())

    def _may_return(self) -> bool:
        """Return True if a server may come back by itself with the weights.

        Healthy servers without weights take the next update, and it need not wait for those that are down.
        """
        states = self._states
        return bool(states.having("out") if states.having("waiting") else states.having(*RETURNING))


ParameterNames = frozenset[str]
"""`rank:name` of all parameters: servers with the same names must have the same checksums."""
ServerChecksums = frozenset[tuple[str, str]]
"""(rank:name, checksum) of all weights of one server."""


class Checksums:
    """Finds servers that confirm the same weights but hold other bytes.

    A server reports checksums of its parameters as it holds them, fused and sharded, with a hash of SGLang's own. So servers
    can be compared with each other, but not with the weight stream. A server that is alone with its parameter names is
    believed at an update, and must repeat the same checksums when its weights are reloaded.
    """

    def __init__(self) -> None:
        self.num_verified = 0
        self._agreed: dict[ParameterNames, ServerChecksums] = {}
        self._reported: dict[Server, ServerChecksums] = {}

    async def ask(self, server: Server) -> None:
        """Keep the checksums that the server reports. Raise RequestFailed if it cannot report them."""
        self._reported.pop(server, None)
        sums = await server.client.weights_checker()
        if sums is None:
            raise RequestFailed(f"{server.url} tells no checksums of its weights any more")
        self._reported[server] = frozenset(sums.items())

    def vote(self, servers: list[Server]) -> None:
        """Set the agreed checksums to what most servers have reported. At a tie nothing is agreed on, and the first server
        whose weights are reloaded decides."""
        votes: defaultdict[ParameterNames, Counter[ServerChecksums]] = defaultdict(Counter)
        for server in servers:
            sums = self._reported[server]
            votes[_names(sums)][sums] += 1
        self.num_verified = sum(counts.total() for counts in votes.values() if counts.total() > 1)
        winners = {names: _winner(counts) for names, counts in votes.items()}
        self._agreed = {names: sums for names, sums in winners.items() if sums is not None}

    async def compare(self, server: Server) -> None:
        """Raise RequestFailed if the server has reported other checksums than those agreed on."""
        reported = self._reported[server]
        agreed = self._agreed.get(_names(reported))
        if agreed is None:
            raise RequestFailed(f"servers disagree on their weights, and {server.url} is in no majority")
        if reported != agreed:
            wrong = sorted(name for name, _ in reported - agreed)
            raise RequestFailed(
                f"{server.url} differs in {len(wrong)} of {len(reported)} weights from servers that were given the same: "
                f"{', '.join(wrong[:3])}{' …' if len(wrong) > 3 else ''}"
            )

    async def check_reloaded(self, server: Server) -> None:
        """Ask a server that has reloaded the current weights, and compare."""
        await self.ask(server)
        reported = self._reported[server]
        self._agreed.setdefault(_names(reported), reported)
        await self.compare(server)


def _names(sums: ServerChecksums) -> ParameterNames:
    return frozenset(name for name, _ in sums)


def _winner(counts: Counter[ServerChecksums]) -> ServerChecksums | None:
    (first, most), *others = counts.most_common(2)
    return None if others and others[0][1] == most else first
