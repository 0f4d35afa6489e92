"""Messages between ranks: which pairs are timed, and whether one link is slow, or everything that one rank sends or receives.

Change here: which ranks try each other, and from when on a time counts as slow. meeting.py sends the messages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

from dapo_mcore.doctor.finding import Finding, hint, ok

_MIB = 2**20
_SLOW, _SLOW_S = 3.0, 0.005
"""A link is slow if it takes this many times the usual time of its kind, and as many seconds longer."""
_SHOWN = 4


class Place(Protocol):
    """Where a rank is: its number in the job, and its node."""

    @property
    def rank(self) -> int: ...
    @property
    def host(self) -> str: ...


@dataclass(frozen=True)
class Link:
    """The seconds that one message took from one rank to another, while neither did anything else."""

    sender: int
    receiver: int
    seconds: float


def partners(number: int, count: int) -> list[int]:
    """Return the members of a ring that one of them tries: its two neighbours, and those halfway round."""
    steps = (1, -1, count // 2, -(count // 2))
    return [partner for partner in dict.fromkeys((number + step) % count for step in steps) if partner != number]


def rounds(count: int) -> list[dict[int, int]]:
    """Return which member of a ring sends to which, round by round. In a round each one sends, receives or waits.

    Every member sends to all its partners and receives from all of them. There are at most 15 rounds, however large the ring.
    """
    found: list[dict[int, int]] = []
    taken: list[set[int]] = []
    for sender in range(count):
        for receiver in partners(sender, count):
            number = next((i for i, busy in enumerate(taken) if busy.isdisjoint((sender, receiver))), len(taken))
            if number == len(taken):
                found.append({})
                taken.append(set())
            found[number][sender] = receiver
            taken[number] |= {sender, receiver}
    return found


def schedule(places: Sequence[Place]) -> list[dict[int, int]]:
    """Return which rank sends to which, round by round: first within all nodes at once, then between nodes.

    Between nodes, the ranks of one local number form a ring, so that every network adapter is tried.
    """
    nodes: dict[str, list[int]] = {}
    for place in places:
        nodes.setdefault(place.host, []).append(place.rank)
    across = [[rank for rank in column if rank is not None] for column in zip_longest(*nodes.values())]
    return [*_together(nodes.values()), *_together(across)]


def _together(rings: Iterable[Sequence[int]]) -> list[dict[int, int]]:
    """Return the rounds of several rings, all of which run at once."""
    named = [[{ring[a]: ring[b] for a, b in pairs.items()} for pairs in rounds(len(ring))] for ring in rings]
    return [{a: b for pairs in column for a, b in pairs.items()} for column in zip_longest(*named, fillvalue={})]


def check_links(places: Sequence[Place], links: Sequence[Link], size: int) -> list[Finding]:
    """Return the usual time of a message of `size` bytes, or what is slow: a rank that is slow with most of its partners, or a
    link between two that are fast with others. Links within a node and between nodes are compared apart."""
    by_rank = {place.rank: place for place in places}
    findings = []
    for kind, on_one_node in (("links in a node", True), ("links of nodes", False)):
        chosen = [link for link in links if (by_rank[link.sender].host == by_rank[link.receiver].host) == on_one_node]
        if chosen:
            findings += _check(kind, chosen, by_rank, size)
    return findings


def _check(kind: str, links: Sequence[Link], places: Mapping[int, Place], size: int) -> list[Finding]:
    seconds = sorted(link.seconds for link in links)
    usual = seconds[len(seconds) // 4]  # one slow node of three is an end of most links
    slow = [link for link in links if link.seconds > max(_SLOW * usual, usual + _SLOW_S)]
    if not slow:
        rate = f"{size / usual / 1e9:.2f} GB/s, {rate_of(size, usual)}"
        return [ok(kind, f"{rate}; the slowest of {len(links)} takes {seconds[-1] * 1e3:.1f} ms")]
    sent, received = Counter(link.sender for link in links), Counter(link.receiver for link in links)
    senders = _slow_ends(sent, Counter(link.sender for link in slow))
    receivers = _slow_ends(received, Counter(link.receiver for link in slow))
    ends = [_end(kind, host, ranks, "sends", slow, usual, size) for host, ranks in _by_host(senders, places)]
    ends += [_end(kind, host, ranks, "receives", slow, usual, size) for host, ranks in _by_host(receivers, places)]
    rest = [link for link in slow if link.sender not in senders and link.receiver not in receivers]
    return ends + [_link(kind, link, places, usual, size, has_others=sent[link.sender] > 1) for link in rest]


def _slow_ends(total: Mapping[int, int], slow: Mapping[int, int]) -> set[int]:
    """Return the ranks that are slow with most of at least two partners."""
    return {rank for rank, count in slow.items() if count >= 2 and 2 * count > total[rank]}


def _by_host(ranks: Iterable[int], places: Mapping[int, Place]) -> list[tuple[str, list[int]]]:
    hosts: dict[str, list[int]] = {}
    for rank in sorted(ranks):
        hosts.setdefault(places[rank].host, []).append(rank)
    return list(hosts.items())


def _end(
    kind: str, host: str, ranks: Sequence[int], verb: str, slow: Sequence[Link], usual: float, size: int
) -> Finding:
    seconds = [link.seconds for link in slow if (link.sender if verb == "sends" else link.receiver) in ranks]
    who = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:_SHOWN]))}{' …' if len(ranks) > _SHOWN else ''}"
    return hint(
        kind,
        f"{host} is slow: {who} there {verb if len(ranks) == 1 else verb.rstrip('s')} {rate_of(size, max(seconds))} with most "
        f"partners, usual are {usual * 1e3:.1f} ms",
        f"look at the adapters, cables and load of {host}, or leave it out (sbatch --exclude={host})",
    )


def _link(kind: str, link: Link, places: Mapping[int, Place], usual: float, size: int, has_others: bool) -> Finding:
    sender, receiver = places[link.sender], places[link.receiver]
    clause = "with other partners both are fast" if has_others else "of two alone it cannot be told which one is slow"
    return hint(
        kind,
        f"rank {sender.rank} on {sender.host} to rank {receiver.rank} on {receiver.host}: {rate_of(size, link.seconds)}, usual "
        f"are {usual * 1e3:.1f} ms; {clause}",
        f"look at what is between {sender.host} and {receiver.host}, or leave one of them out (sbatch --exclude)",
    )


def rate_of(size: int, seconds: float) -> str:
    return f"{size // _MIB} MiB in {seconds * 1e3:.1f} ms"
