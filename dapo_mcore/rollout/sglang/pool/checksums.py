"""Whether servers that have confirmed the same weights hold the same bytes, by the checksums that they report of them.

Change here: who is compared with whom, and who is taken out. A server tells checksums of its parameters as it holds them,
fused and sharded, by a hash of SGLang's own: servers can be compared with each other, but not with the stream.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from dapo_mcore.rollout.sglang.client.http import RequestFailed
from dapo_mcore.rollout.sglang.pool.server import Member

Sums = frozenset[tuple[str, str]]
"""(rank and parameter, checksum) of all of a server's weights."""
Layout = frozenset[str]
"""The ranks and parameters: servers that have the same must agree."""


class Checksums:
    """Of the current weights. A server alone in its layout is believed at an update, and held to it when it is re-synced."""

    def __init__(self) -> None:
        self.num_verified = 0
        self._agreed: dict[Layout, Sums] = {}
        self._told: dict[Member, Sums] = {}

    async def ask(self, member: Member) -> None:
        """Keeps what the member's server tells. Raises RequestFailed when it cannot tell."""
        self._told.pop(member, None)
        sums = await member.api.checksums()
        if sums is None:
            raise RequestFailed(f"{member.api.url} tells no checksums of its weights any more")
        self._told[member] = frozenset(sums.items())

    def agree(self, members: list[Member]) -> None:
        """Settles what is right by what `members` have told: what most say. At a tie, what the first re-synced one says."""
        votes: defaultdict[Layout, Counter[Sums]] = defaultdict(Counter)
        for member in members:
            votes[_layout(self._told[member])][self._told[member]] += 1
        self.num_verified = sum(counts.total() for counts in votes.values() if counts.total() > 1)
        winners = {layout: _winner(counts) for layout, counts in votes.items()}
        self._agreed = {layout: sums for layout, sums in winners.items() if sums is not None}

    async def judge(self, member: Member) -> None:
        """Raises RequestFailed when the member's server has told anything but what was agreed on."""
        told = self._told[member]
        agreed = self._agreed.get(_layout(told))
        if agreed is None:
            raise RequestFailed(f"servers disagree on their weights, and {member.api.url} is in no majority")
        if told != agreed:
            wrong = sorted(name for name, _ in told - agreed)
            raise RequestFailed(
                f"{member.api.url} differs in {len(wrong)} of {len(told)} weights from servers that were given the same: "
                f"{', '.join(wrong[:3])}{' …' if len(wrong) > 3 else ''}"
            )

    async def check(self, member: Member) -> None:
        """`ask` and `judge`, of a server that was given the current weights again."""
        await self.ask(member)
        told = self._told[member]
        self._agreed.setdefault(_layout(told), told)
        await self.judge(member)


def _layout(sums: Sums) -> Layout:
    return frozenset(name for name, _ in sums)


def _winner(counts: Counter[Sums]) -> Sums | None:
    (first, most), *others = counts.most_common(2)
    return None if others and others[0][1] == most else first
