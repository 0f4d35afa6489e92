"""All ranks of a job meet: they tell rank 0 about themselves, try to reach each other, and time collectives and links.

    every rank ── its record ──→ rank 0 ── all places ──→ first rank of each node ── what it cannot reach ──→ rank 0 ── go on or not

All this passes through the launcher's store, so rank 0 has it even where gloo or NCCL cannot connect. Change here: what is sent and
timed between ranks. No model and no Megatron: only torch.distributed.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from statistics import median
from typing import TYPE_CHECKING, Any

from dapo_mcore.doctor.finding import State
from dapo_mcore.doctor.links import Link, partners, schedule
from dapo_mcore.doctor.network import INTERFACES
from dapo_mcore.doctor.rank import Rank, from_json, to_json

if TYPE_CHECKING:
    from torch.distributed import Store

JOIN_S = 300
"""The first rank of a node comes late: it imports packages to see whether they work."""
_CONNECT_S, _REACH_S, _LEAVE_S = 120.0, 5.0, 10.0
_REPEATS = 5
_MIB = 2**20
_MIB_ON_GPUS, _MIB_ON_CPUS = 256, 4

Unreached = tuple[str, str, str, str]
"""A failed connection: the node that tried, the node that it tried, the address, the error."""


@dataclass(frozen=True)
class Times:
    """Medians of a rank in seconds, for messages of `num_bytes`.

    links    what it received
    clock_s  its clock, read after a barrier
    """

    num_bytes: int
    all_reduce: float
    broadcast: float
    links: tuple[Link, ...]
    clock_s: float


@dataclass(frozen=True)
class Meeting:
    """What rank 0 learns. Other ranks get an empty one.

    absent     ranks that did not come
    unreached  connections between nodes that failed
    errors     by rank, why gloo or NCCL did not connect or send
    times      empty after any of these, and if ranks lack GPUs
    """

    ranks: tuple[Rank, ...] = ()
    absent: tuple[int, ...] = ()
    unreached: tuple[Unreached, ...] = ()
    errors: tuple[tuple[int, str], ...] = ()
    times: tuple[Times, ...] = ()


@dataclass(frozen=True)
class _Place:
    """Where a rank is. port 0: it is not the first rank of its node."""

    rank: int
    host: str
    addresses: tuple[str, ...]
    port: int


def meet(own: Rank, join_s: float = JOIN_S) -> Meeting:
    """Join the job, and return what rank 0 learns of the others. Every rank calls it.

    Collectives over all ranks: gloo on CPUs; on GPUs NCCL for what is timed. Raise RuntimeError if the store cannot be reached, or
    rank 0 is lost.
    """
    from torch.distributed.rendezvous import rendezvous

    store, _, size = next(rendezvous("env://", timeout=timedelta(seconds=join_s)))
    return meet_at(store, own, size, join_s)


def meet_at(store: Store, own: Rank, size: int, join_s: float) -> Meeting:
    """Do the same at a store that all ranks have."""
    store.set_timeout(timedelta(seconds=join_s + _CONNECT_S + _LEAVE_S))  # rank 0 may wait as long for another one
    with _listener(own) as port:
        store.set(f"rank/{own.rank}", to_json(replace(own, port=port)))
        meeting = _meet(store, own, *(_gather(store, size, join_s) if own.rank == 0 else ((), ())))
        _leave(store, own.rank, size - len(meeting.absent))
    return meeting


def _meet(store: Store, own: Rank, ranks: Sequence[Rank], absent: Sequence[int]) -> Meeting:
    meeting = Meeting(tuple(ranks), tuple(absent))
    found = _agree(store, own.rank, "places", lambda: [] if absent else [_place(rank) for rank in ranks])
    places = [_Place(**place) for place in found]
    if not places:
        return meeting
    nodes = [place for place in places if place.port]
    numbers = {place.rank: number for number, place in enumerate(nodes)}
    if own.rank in numbers:
        store.set(f"tried/{own.rank}", json.dumps(_try_partners(own.host, numbers[own.rank], nodes)))

    def unreached() -> list[list[str]]:
        return [failed for rank in numbers for failed in json.loads(store.get(f"tried/{rank}"))]

    failures = _agree(store, own.rank, "unreached", unreached)
    goes_on = _agree(store, own.rank, "go on", lambda: not failures and _can_time(ranks))
    if own.rank == 0:
        meeting = replace(meeting, unreached=tuple((a, b, c, d) for a, b, c, d in failures))
    return _with_times(store, own, places, meeting) if goes_on else meeting


def _agree(store: Store, rank: int, name: str, decide: Callable[[], Any]) -> Any:
    """Return what rank 0 decides, on all ranks. It must be JSON."""
    if rank == 0:
        store.set(name, json.dumps(decide()))
    return json.loads(store.get(name))


def _gather(store: Store, size: int, join_s: float) -> tuple[list[Rank], list[int]]:
    """Return the records of all ranks that come, and the numbers of the others."""
    deadline, ranks, absent = time.monotonic() + join_s, [], []
    for rank in range(size):
        try:
            store.wait([f"rank/{rank}"], timedelta(seconds=max(deadline - time.monotonic(), 0.1)))
            ranks.append(from_json(store.get(f"rank/{rank}").decode()))
        except RuntimeError:
            absent.append(rank)
    return ranks, absent


def _place(rank: Rank) -> dict[str, Any]:
    addresses = tuple(dict.fromkeys((rank.address, rank.gloo)))
    return asdict(_Place(rank.rank, rank.host, addresses, rank.port))


@contextmanager
def _listener(own: Rank) -> Iterator[int]:
    """Listen on all addresses, on a port that the kernel gives; on the first rank of a node only. Nothing is ever read."""
    if own.local != 0:
        yield 0
        return
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    dual = family == socket.AF_INET6
    with socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=64) as server:
        yield server.getsockname()[1]


def _try_partners(host: str, number: int, nodes: Sequence[_Place]) -> list[Unreached]:
    """Return the addresses of this node's partners where nothing answers."""
    failed = []
    for partner in (nodes[index] for index in partners(number, len(nodes))):
        for address in partner.addresses:
            try:
                socket.create_connection((address, partner.port), timeout=_REACH_S).close()
            except OSError as error:
                failed.append((host, partner.host, address, str(error)))
    return failed


def _can_time(ranks: Sequence[Rank]) -> bool:
    """Return True if all ranks can send the same way: from CPUs or each from a GPU of its own, by interfaces that exist."""
    known = [found for rank in ranks for findings in rank.findings.values() for found in findings]
    if any(found.name in INTERFACES and found.state is State.WRONG for found in known):
        return False
    gpus = [(rank.host, rank.gpu) for rank in ranks if rank.gpu]
    return all(rank.device == "CPU" for rank in ranks) or len(set(gpus)) == len(ranks)


def _with_times(store: Store, own: Rank, places: Sequence[_Place], meeting: Meeting) -> Meeting:
    try:
        outcome = {"times": asdict(_time_all(store, own, places))}
    except RuntimeError as error:
        outcome = {"error": str(error)}
    store.set(f"outcome/{own.rank}", json.dumps(outcome))
    if own.rank != 0:
        return meeting
    outcomes = {place.rank: json.loads(store.get(f"outcome/{place.rank}")) for place in places}
    errors = tuple((rank, found["error"]) for rank, found in outcomes.items() if "error" in found)
    if errors:
        return replace(meeting, errors=errors)
    return replace(meeting, times=tuple(_times(found["times"]) for found in outcomes.values()))


def _times(content: dict[str, Any]) -> Times:
    return Times(**{**content, "links": tuple(Link(**link) for link in content["links"])})


def _leave(store: Store, rank: int, size: int) -> None:
    """Return on rank 0 when the others have left, as it may hold the store."""
    store.add("left", 1)
    deadline = time.monotonic() + _LEAVE_S
    while rank == 0 and store.add("left", 0) < size and time.monotonic() < deadline:
        time.sleep(0.05)


def _time_all(store: Store, own: Rank, places: Sequence[_Place]) -> Times:
    import torch
    import torch.distributed as dist

    on_gpu = own.device != "CPU"
    if on_gpu:
        torch.cuda.set_device(own.local)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=dist.PrefixStore("collectives", store),
        rank=own.rank,
        world_size=len(places),
        timeout=timedelta(seconds=_CONNECT_S),
    )
    try:
        dist.all_reduce(torch.zeros(1))  # the first collective connects, which takes time
        dist.barrier()
        clock_s = time.time()
        size = (_MIB_ON_GPUS if on_gpu else _MIB_ON_CPUS) * _MIB
        data = torch.ones(size // 4, device="cuda" if on_gpu else "cpu")
        return Times(
            num_bytes=size,
            all_reduce=_median_time(lambda: dist.all_reduce(data, op=dist.ReduceOp.MAX), on_gpu),
            broadcast=_median_time(lambda: dist.broadcast(data, src=0), on_gpu),
            links=tuple(_time_links(own.rank, places, data, on_gpu)),
            clock_s=clock_s,
        )
    finally:
        dist.destroy_process_group()


def _time_links(rank: int, places: Sequence[_Place], data: Any, on_gpu: bool) -> Iterator[Link]:
    """Yield the links over which this rank receives."""
    import torch
    import torch.distributed as dist

    received = torch.empty_like(data)
    for pairs in schedule(places):
        sender = next((sender for sender, receiver in pairs.items() if receiver == rank), None)
        operations = [dist.P2POp(dist.isend, data, pairs[rank])] if rank in pairs else []
        operations += [dist.P2POp(dist.irecv, received, sender)] if sender is not None else []
        seconds = _median_time(lambda operations=operations: _send(operations), on_gpu)
        if sender is not None:
            yield Link(sender, rank, seconds)


def _send(operations: Sequence[Any]) -> None:
    import torch.distributed as dist

    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()


def _median_time(action: Callable[[], object], on_gpu: bool) -> float:
    """Return the median seconds of an action that all ranks begin together, after one that does not count."""
    import torch
    import torch.distributed as dist

    seconds = []
    for _ in range(1 + _REPEATS):
        dist.all_reduce(torch.zeros(1))  # a barrier on the host
        start = time.perf_counter()
        action()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])
