"""All ranks of a job: whether their nodes are alike, and how fast they reach each other.

Change here: what ranks tell about themselves, and what is timed between them. No model and no Megatron: only torch.distributed.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from statistics import median

from dapo_mcore.doctor.finding import Finding, hint, ok, wrong
from dapo_mcore.errors import ConfigError

JOIN_S = 300
"""The first rank of a node comes late: it imports packages to see whether they work."""
_REPEATS = 5
_MIB, _GIB = 2**20, 2**30
_MIB_ON_GPUS, _MIB_ON_CPUS = 256, 4
_SLOW, _SLOW_S = 3.0, 0.005
"""A link is slow if it takes this many times the median of its kind, and as many seconds longer."""
_LEAST_FREE = 0.9
_MOST_CLOCK_S = 1.0


@dataclass(frozen=True)
class Rank:
    """What a rank tells the others.

    address     its own address towards rank 0; interface: the network interface that has it
    device      the GPU's name, or `CPU`
    free_bytes  of the GPU; of the machine's memory without one
    clock_s     its clock, read after a barrier
    worries     lines about its node, of the checks of this machine; only the first rank of a node has them
    """

    rank: int
    host: str
    address: str
    interface: str
    device: str
    free_bytes: int
    versions: Mapping[str, str]
    clock_s: float = 0.0
    worries: tuple[Finding, ...] = ()

    @property
    def where(self) -> str:
        return f"rank {self.rank} on {self.host}"


@dataclass(frozen=True)
class Times:
    """Medians of a rank in seconds, for messages of `num_bytes`.

    link  receiving from the rank before it (the last one before rank 0), while all ranks send to the next one
    """

    num_bytes: int
    all_reduce: float
    broadcast: float
    link: float


def check_nodes(ranks: Sequence[Rank]) -> list[Finding]:
    """Return whether all ranks have the same software, devices, free memory and time."""
    return [
        _nodes(ranks),
        *_alike("versions", ranks, lambda rank: [f"{name} {text}" for name, text in sorted(rank.versions.items())]),
        *_alike("devices", ranks, lambda rank: [rank.device]),
        _free_memory(ranks),
        _clocks(ranks),
        *_worries(ranks),
    ]


def check_times(ranks: Sequence[Rank], times: Sequence[Times]) -> list[Finding]:
    """Return the rates of collectives, and each link that is much slower than others of its kind."""
    size, count = times[0].num_bytes, len(ranks)
    if count == 1:
        return []
    reduce, broadcast = (max(getattr(time, name) for time in times) for name in ("all_reduce", "broadcast"))
    on_wire = 2 * (count - 1) / count * size
    findings = [
        ok("all-reduce", f"{_rate(size, reduce)} over {count} ranks; {on_wire / reduce / 1e9:.2f} GB/s per rank"),
        ok("broadcast", f"{_rate(size, broadcast)} from rank 0; {size / broadcast / 1e9:.2f} GB/s"),
    ]
    for kind, on_one_node in (("links in a node", True), ("links of nodes", False)):
        links = [
            (ranks[number - 1], rank, times[number].link)
            for number, rank in enumerate(ranks)
            if (rank.host == ranks[number - 1].host) == on_one_node
        ]
        if links:
            findings += _links(kind, links, size)
    return findings


def _links(kind: str, links: Sequence[tuple[Rank, Rank, float]], size: int) -> list[Finding]:
    usual = median(seconds for *_, seconds in links)
    slow = [link for link in links if link[2] > max(_SLOW * usual, usual + _SLOW_S)]
    if not slow:
        slowest = max(seconds for *_, seconds in links)
        return [ok(kind, f"{_rate(size, usual)} to the next rank, the slowest of {len(links)} {slowest * 1e3:.1f} ms")]
    return [
        hint(
            kind,
            f"from {sender.where} to {receiver.where} {_rate(size, seconds)}, the median of {len(links)} {usual * 1e3:.1f} ms",
            f"compare links and load of {sender.host} and {receiver.host}, or leave the slower one out (sbatch --exclude)",
        )
        for sender, receiver, seconds in slow
    ]


def _rate(size: int, seconds: float) -> str:
    return f"{size // _MIB} MiB in {seconds * 1e3:.1f} ms"


def _nodes(ranks: Sequence[Rank]) -> Finding:
    first = {rank.host: rank for rank in reversed(ranks)}
    shown = [f"{host} {rank.address} ({rank.interface})" for host, rank in sorted(first.items())]
    more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
    detail = f"{len(ranks)} ranks on {len(first)} nodes: {', '.join(shown[:4])}{more}"
    loopback = [rank for rank in first.values() if rank.address.startswith("127.")]
    if len(first) > 1 and len(loopback) > 1:
        return hint(
            "nodes",
            f"{detail}; {len(loopback)} of them by a loopback address, which others cannot reach",
            "give torchrun the first node's real address as --rdzv-endpoint, and --local-addr on each node",
        )
    return ok("nodes", detail)


def _alike(name: str, ranks: Sequence[Rank], read: Callable[[Rank], Sequence[str]]) -> list[Finding]:
    """Return one finding for the ranks of a node that differ from most others in the same way."""
    values = [tuple(read(rank)) for rank in ranks]
    (usual, count), *others = Counter(values).most_common()
    if not others:
        return [ok(name, f"alike on all ranks: {', '.join(usual)}")]
    different: dict[tuple[str, tuple[str, ...]], list[Rank]] = {}
    for rank, own in zip(ranks, values, strict=True):
        if own != usual:
            different.setdefault((rank.host, own), []).append(rank)
    most = f"{count} of {len(ranks)} ranks"
    remedy = "start the same environment or container on every node, on nodes with the same GPUs"
    return [
        wrong(name, f"{_where(found)} {_difference(own, usual, most)}", remedy) for (_, own), found in different.items()
    ]


def _where(ranks: Sequence[Rank]) -> str:
    """Return `rank 3 on node0:`, or `ranks 0, 1, 2 on node0:` for several of one node."""
    if len(ranks) == 1:
        return f"{ranks[0].where}:"
    return f"ranks {', '.join(str(rank.rank) for rank in ranks)} on {ranks[0].host}:"


def _difference(own: Sequence[str], usual: Sequence[str], most: str) -> str:
    extra, missing = (", ".join(sorted(set(a) - set(b))) for a, b in ((own, usual), (usual, own)))
    if not extra:
        return f"no {missing}, which {most} have"
    return f"{extra}, but {most} have {missing or 'none'}"


def _free_memory(ranks: Sequence[Rank]) -> Finding:
    usual = median(rank.free_bytes for rank in ranks)
    low = [rank for rank in ranks if rank.free_bytes < _LEAST_FREE * usual]
    if not low:
        return ok("free memory", f"at least {min(r.free_bytes for r in ranks) / _GIB:.1f} GiB on every rank")
    shown = ", ".join(f"{rank.where} {rank.free_bytes / _GIB:.1f} GiB" for rank in low[:4])
    more = f" and {len(low) - 4} more" if len(low) > 4 else ""
    return hint(
        "free memory",
        f"{shown}{more}; the median is {usual / _GIB:.1f} GiB",
        "end what an earlier job left there (nvidia-smi, ps), or leave the node out (sbatch --exclude)",
    )


def _clocks(ranks: Sequence[Rank]) -> Finding:
    usual = median(rank.clock_s for rank in ranks)
    far = max(ranks, key=lambda rank: abs(rank.clock_s - usual))
    difference = far.clock_s - usual
    if abs(difference) <= _MOST_CLOCK_S:
        return ok("clocks", f"within {_MOST_CLOCK_S:.0f} s of each other")
    return hint(
        "clocks",
        f"{far.where} is {difference:+.1f} s from the median, so its logs and files have wrong times",
        "start a time service there (chrony, systemd-timesyncd)",
    )


def _worries(ranks: Sequence[Rank]) -> list[Finding]:
    """Return what other nodes find wrong or odd, and rank 0's node does not."""
    known = {(found.name, found.state) for found in ranks[0].worries}
    return [
        Finding(found.name, found.state, f"{rank.where}: {found.detail}", found.remedy)
        for rank in ranks[1:]
        for found in rank.worries
        if (found.name, found.state) not in known
    ]


def describe_rank(versions: Mapping[str, str], worries: Sequence[Finding], master: str) -> Rank:
    """Return this rank's own record. `master` is the address of rank 0's node.

    Raise ConfigError if the launcher shows this rank fewer GPUs than it has ranks on the node.
    """
    import psutil
    import torch

    address = _address_towards(master)
    device, free = "CPU", psutil.virtual_memory().available
    if torch.cuda.is_available():
        number, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if number >= count:
            raise ConfigError(
                f"LOCAL_RANK is {number}, but this process sees {count} GPUs; start one torchrun per node and let it see all of "
                "them (srun --gpus-per-node, not --gpus-per-task), or fewer ranks per node"
            )
        device, free = torch.cuda.get_device_name(number), torch.cuda.mem_get_info(number)[0]
    return Rank(
        int(os.environ["RANK"]),
        this_node(),
        address,
        _interface_of(address),
        device,
        free,
        versions,
        worries=tuple(worries),
    )


def this_node() -> str:
    """Return this machine's name, as Slurm calls it if it started this process: so it can be left out of a job."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _address_towards(master: str) -> str:
    """Return the address from which packets to `master` leave. Sends nothing."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(master, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            return probe.getsockname()[0]
    except OSError:
        return "no route"


def _interface_of(address: str) -> str:
    import psutil

    found = [name for name, all_of in psutil.net_if_addrs().items() if any(a.address == address for a in all_of)]
    return found[0] if found else "no interface"


def meet(own: Rank, join_s: float = JOIN_S) -> tuple[list[Rank], list[Times]]:
    """Join the job, and return all ranks' records and times, in rank order.

    Collectives over all ranks: gloo on CPUs; on GPUs NCCL for what is timed. Raise RuntimeError if the ranks cannot connect.
    """
    from dataclasses import replace

    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(seconds=join_s))
    try:
        count = dist.get_world_size()
        dist.all_reduce(torch.zeros(1))  # the first collective connects, which takes time
        dist.barrier()
        own = replace(own, clock_s=time.time())
        ranks: list[Rank] = [own] * count
        dist.all_gather_object(ranks, own)
        all_times: list[Times] = [_time_collectives(on_gpu)] * count
        dist.all_gather_object(all_times, all_times[0])
        return ranks, all_times
    finally:
        dist.destroy_process_group()


def _time_collectives(on_gpu: bool) -> Times:
    import torch
    import torch.distributed as dist

    size = (_MIB_ON_GPUS if on_gpu else _MIB_ON_CPUS) * _MIB
    data = torch.ones(size // 4, device="cuda" if on_gpu else "cpu")
    received, rank, count = torch.empty_like(data), dist.get_rank(), dist.get_world_size()

    def pass_on() -> None:
        send = dist.P2POp(dist.isend, data, (rank + 1) % count)
        receive = dist.P2POp(dist.irecv, received, (rank - 1) % count)
        for work in dist.batch_isend_irecv([send, receive]):
            work.wait()

    return Times(
        num_bytes=size,
        all_reduce=_median_time(lambda: dist.all_reduce(data, op=dist.ReduceOp.MAX), on_gpu),
        broadcast=_median_time(lambda: dist.broadcast(data, src=0), on_gpu),
        link=_median_time(pass_on, on_gpu) if count > 1 else 0.0,
    )


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
