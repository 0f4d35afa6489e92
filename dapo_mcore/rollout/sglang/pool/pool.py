"""The servers of a run: who serves, who is out, how one comes back, and a weight update as a transaction over all.

Change here: when a server is taken out, and what it must show before it serves again. The rule that everything here keeps:
a server is `serving` only while it has confirmed that it holds the current weights.

    waiting (no current weights) → update → serving → suspect → out → healthy, or down until restarted → re-synced → serving
                                                                                └ budget spent → lost     └ not kept → waiting

Where all that are well only wait for weights, the fleet is starving: then another update is due, see handover.py.

Where servers share GPUs with the trainer: serving → release → waiting (asleep) → update → resume → serving. While they are
asleep no server starts, and one that is out is stopped: the memory is the trainer's.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

from dapo_mcore.errors import ConfigError, RolloutError, UpdateBroken
from dapo_mcore.rollout.sglang.client.api import ALL_MEMORY, WEIGHT_MEMORY
from dapo_mcore.rollout.sglang.client.http import RequestFailed
from dapo_mcore.rollout.sglang.pool.checksums import Checksums
from dapo_mcore.rollout.sglang.pool.recovery import Revival
from dapo_mcore.rollout.sglang.pool.roster import AWAY, Roster
from dapo_mcore.rollout.sglang.pool.server import GENERATING, Member, Patience
from dapo_mcore.rollout.sglang.pool.transaction import Transaction

Resync = Callable[[Member, str], Awaitable[None]]
"""Gives one server the weights of a tag, from where they are kept."""


class Fleet:
    """Lives in one event loop.

    resync     None where weights are not kept: then a server that was out rejoins at the next update.
    router     generates in place of the members, which then only take weights. It may ask one that is out: the version
               of the answer tells.
    checksums  compares what servers hold; None asks nobody.
    resumes    whether requests in flight go on after an update, under the new weights; else it ends them.
    may_starve whether somebody updates again when `starving`, so that requests may wait for it.
    tell       shows a line about a server that is out, or back.
    """

    def __init__(
        self,
        members: Sequence[Member],
        patience: Patience,
        resync: Resync | None = None,
        router: Member | None = None,
        checksums: Checksums | None = None,
        resumes: bool = False,
        may_starve: Callable[[], bool] = lambda: False,
        tell: Callable[[str], None] = lambda line: None,
    ):
        self._roster, self.resync, self._router = Roster(members, tell), resync, router
        self.checksums, self._resumes = checksums, resumes
        self._may_starve = may_starve
        self.counts: Counter[str] = Counter()
        self._paused, self._num_pauses = False, 0
        self._patience = patience
        self._changed = asyncio.Condition()
        self._weights = asyncio.Lock()
        self._awake = asyncio.Event()
        self._awake.set()
        self._revival = Revival(patience, self._roster, self.counts, self._awake, self._find_down)
        self._target: str | None = None
        self._tasks = {asyncio.create_task(self._watch())}

    @property
    def members(self) -> list[Member]:
        return self._roster.members

    @property
    def serving(self) -> list[Member]:
        return self._roster.of("serving")

    @property
    def starving(self) -> bool:
        """Whether none serves, while some are well and only lack the weights: another update finds them."""
        lost = self._awake.is_set() and self._target is not None and not self.serving
        return lost and bool(self._roster.of("waiting")) and not self._roster.of("out")

    async def acquire(self, avoid: Member | None = None) -> Member:
        """The serving member with the fewest requests, once one has room; `avoid` only where it is the only one.

        Raises RolloutError when none serves, none is on its way back, and no update is to come that finds one.
        """
        async with self._changed:
            while True:
                free = [m for m in self._generators() if len(m.calls) < self._patience.max_in_flight]
                if free:
                    return min(free, key=lambda m: (m is avoid, len(m.calls)))
                if not (self.serving or self._roster.of(*AWAY) or self._may_update()):
                    raise RolloutError(self._roster.describe())
                try:
                    await self._changed.wait()
                except asyncio.CancelledError:
                    self._changed.notify()  # perhaps told of a place already, which Condition forgets before Python 3.13
                    raise

    async def call(self, member: Member, request: Coroutine[Any, Any, Any]) -> Any:
        """Awaits a generation request of `member`; RequestFailed when the server is taken out for good meanwhile."""
        task = asyncio.create_task(request)
        member.calls.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():
                task.cancel()
                raise
            raise RequestFailed(f"{member.api.url} was given up: {member.problem}") from None
        finally:
            member.calls.discard(task)
            async with self._changed:
                self._changed.notify()

    async def abort(self, member: Member, rid: str) -> None:
        """Ends a request of `member`; of the router's, wherever it is. The server would notice the closed connection by
        itself, but only seconds later."""
        await asyncio.gather(*(m.abort(rid) for m in (self.members if member is self._router else [member])))

    def suspect(self, member: Member, problem: str, reload: bool = False) -> None:
        """Takes a serving member out and starts its way back, with new weights where `reload` says that its are wrong.

        The router is never out: there is nothing else to ask.
        """
        if member is self._router:
            member.problem = problem
        if member.state != "serving" or member is self._router:
            return
        if reload:
            member.tag, member.link = None, None  # its owner may have started it again
            self._give_up_calls(member)
        self._roster.leave(member, problem, GENERATING)
        self.counts["servers_suspected"] += 1
        self._spawn(self._bring_back(member))

    async def update(self, tag: str, steps: Callable[[Transaction], Awaitable[None]]) -> None:
        """Moves every member that can be reached to the weights `tag` by `steps`; those that fail are taken out.

        On return at least one serves, and all that serve have confirmed `tag`. Raises RolloutError when none does:
        UpdateBroken when another update would find some that are well. Servers that are asleep take memory for weights
        alone, and serve from `resume` on.
        """
        async with self._pause():
            previous, self._target = self._target, tag
            transaction = self._transaction(tag)
            try:
                await transaction.each("pause", lambda m: m.api.pause("retract" if self._resumes else "abort"))
                await transaction.each("take memory", lambda m: m.take_memory(WEIGHT_MEMORY))
                await steps(transaction)
                await transaction.each("confirm", self._confirm)
                await self._compare(transaction)
                if self._awake.is_set():
                    await self._open(transaction)
                if self._router is not None:  # its answers do not tell which of them work
                    for member in transaction.members:
                        member.strikes = 0
            except BaseException:
                self._target = previous
                for member in transaction.members:
                    self._take_out(member, "the weight update was broken off")
                raise
        if self._awake.is_set():
            await self._settle()

    async def release(self) -> None:
        """Every server gives up its device memory, or is stopped; none serves before `update` and `resume`."""
        async with self._pause():
            self._awake.clear()
            returning = self._roster.of(*AWAY)
            transaction = self._transaction(None)
            await transaction.each("pause", lambda m: m.api.pause())
            await transaction.each("release memory", lambda m: m.release_memory())
            stops = (self._revival.stop(m, forgiven=m in returning) for m in self._roster.of(*AWAY))
            await asyncio.gather(*stops)
            for member in transaction.members:
                member.state = "waiting"

    async def resume(self) -> None:
        """The servers with the current weights take the rest of their memory and serve; stopped ones start again.

        Raises RolloutError when none serves.
        """
        async with self._weights:
            transaction = self._transaction(self._target)
            for member in [m for m in transaction.members if m.tag != self._target]:
                transaction.members.remove(member)
            await transaction.each("take memory", lambda m: m.take_memory(ALL_MEMORY))
            await self._open(transaction)
            self._awake.set()
        await self._settle()

    async def close(self) -> None:
        """Ends the fleet's own tasks; the servers go on."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @asynccontextmanager
    async def _pause(self) -> AsyncIterator[None]:
        """Servers may be paused inside, and then look as if they hung."""
        async with self._weights:
            self._paused, self._num_pauses = True, self._num_pauses + 1
            try:
                yield
            finally:
                self._paused = False

    def _transaction(self, tag: str | None) -> Transaction:
        """Over every member that can be reached."""
        for member in self.serving:
            member.passed(GENERATING)
        members = self._roster.of("serving", "waiting")
        return Transaction(members, tag, self._patience.step_timeout_s, self._take_out)

    async def _open(self, transaction: Transaction) -> None:
        await transaction.each("resume", lambda m: m.api.resume())
        for member in transaction.members:
            self._serve(member)

    def _take_out(self, member: Member, problem: str, place: str | None = None) -> None:
        """A member whose weights are in doubt: nothing it says counts until it is re-synced. `place` as Member's.

        Its requests are given up before it is resumed: it would go on with them under half an update.
        """
        self._give_up_calls(member)
        on_its_way_back = member.state in AWAY
        member.tag, member.link = None, None
        self._roster.leave(member, problem, place)
        self.counts["servers_excluded"] += 1
        if not on_its_way_back:
            self._spawn(self._bring_back(member))

    async def _bring_back(self, member: Member) -> None:
        """Waits for health or restarts, re-syncs, and lets the member serve; or gives it up."""
        async with self._weights:  # suspected during an update, it must not be resumed before the end
            if member.state == "serving":
                return
        try:
            if not self._awake.is_set():
                await self._revival.stop(member)
                await self._awake.wait()
            if await self._revival.revive(member):
                await self._give_weights(member)
            else:
                self._roster.lose(member)
        except (RolloutError, ConfigError, TimeoutError) as error:
            late = f"it had not taken its weights again within {self._patience.step_timeout_s:g} s"
            self._take_out(member, str(error) or late, "coming back" if self._awake.is_set() else None)
            self._spawn(self._bring_back(member))
        except Exception as error:  # nobody awaits this task: whoever waits for the member must hear of it
            member.problem = repr(error)
            self._roster.lose(member)
        finally:
            async with self._changed:
                self._changed.notify_all()

    async def _give_weights(self, member: Member) -> None:
        async with self._weights:
            if member.tag is not None and member.tag != await member.api.weight_version():
                member.tag, member.link = None, None  # started again by its owner
            if member.tag is not None and member.tag == self._target:
                self._serve(member)
            elif self.resync is not None and self._target is not None:
                member.tag = None
                await asyncio.wait_for(self._reload(member, self._target), self._patience.step_timeout_s)
                self._serve(member)
                self.counts["servers_resynced"] += 1
            else:
                self._roster.ready(member)

    async def _reload(self, member: Member, tag: str) -> None:
        await member.api.pause()
        await self.resync(member, tag)
        await self._confirm(member)
        if self.checksums is not None:
            await self.checksums.check(member)
        await member.api.resume()

    async def _confirm(self, member: Member) -> None:
        told = await member.api.weight_version()
        if told != self._target:
            raise RequestFailed(f"{member.api.url} reports weights {told!r} after it was given {self._target!r}")
        member.tag = self._target

    async def _compare(self, transaction: Transaction) -> None:
        if self.checksums is not None:
            await transaction.each("ask for checksums", self.checksums.ask)
            self.checksums.agree(transaction.members)
            await transaction.each("compare checksums", self.checksums.judge)

    async def _settle(self) -> None:
        """Waits until somebody serves the target, where all failed but may come back with it."""
        async with self._changed:
            self._changed.notify_all()
            while not self.serving and self._may_settle():
                await self._changed.wait()
        if not self.serving:
            problem = UpdateBroken if self._roster.of("waiting") else RolloutError
            raise problem(self._roster.describe())

    def _may_settle(self) -> bool:
        """Where weights are not kept, those that are well take the next update without waiting for those that are down."""
        return bool(self._roster.of("out") if self._roster.of("waiting") else self._roster.of(*AWAY))

    async def _watch(self) -> None:
        """Finds servers that hang: they accept requests and never answer."""
        while True:
            await asyncio.sleep(self._patience.health_interval_s)
            if self._paused:
                continue
            members, num_pauses = self.serving, self._num_pauses
            members += [self._router] if self._router is not None else []
            answers = await asyncio.gather(*(m.api.healthy(self._patience.health_timeout_s) for m in members))
            if self._num_pauses > num_pauses:
                continue
            for member, healthy in zip(members, answers):
                if not healthy:
                    self.suspect(member, f"no sign of health within {self._patience.health_timeout_s:g} s")
                    self._give_up_calls(member)

    def _serve(self, member: Member) -> None:
        assert member.tag == self._target, f"{member.api.url} holds {member.tag}, not {self._target}"
        self._roster.serve(member)

    def _generators(self) -> list[Member]:
        return [self._router] if self._router is not None and self.serving else self.serving

    def _may_update(self) -> bool:
        """Whether a request may wait for an update: of servers that starve, or the repeat of one that broke off."""
        return (self._may_starve() or self._resumes) and bool(self._roster.of("waiting"))

    async def _find_down(self, member: Member) -> None:
        member.state = "down"
        self._give_up_calls(member)
        async with self._changed:
            self._changed.notify_all()

    def _give_up_calls(self, member: Member) -> None:
        for task in member.calls:
            task.cancel()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
