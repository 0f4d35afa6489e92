"""The nodes of a job beside each other: whether they are alike, and what each of them found about itself.

Change here: what is compared between ranks, and how findings of many nodes become a few lines. links.py compares links.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import median

from dapo_mcore.doctor.finding import Finding, State, hint, ok, wrong
from dapo_mcore.doctor.links import check_links, rate_of
from dapo_mcore.doctor.meeting import JOIN_S, Meeting, Times
from dapo_mcore.doctor.network import check_reach
from dapo_mcore.doctor.rank import Rank
from dapo_mcore.errors import shortened

_GIB = 2**30
_LEAST_FREE = 0.9
_MOST_CLOCK_S = 1.0
_SHOWN = 4
_LONGEST_ERROR = 300


def merge(nodes: Mapping[str, Sequence[Finding]]) -> list[Finding]:
    """Return the findings of all nodes, by the name of what was looked at.

    What is in order everywhere is one line, with the first node's numbers. Anything else names its nodes, and takes the place of
    what is in order on others.
    """
    by_name: dict[str, dict[Finding, list[str]]] = {}
    for host, findings in nodes.items():
        for found in findings:
            hosts = by_name.setdefault(found.name, {}).setdefault(found, [])
            hosts += [host] * (host not in hosts[-1:])
    return [line for found in by_name.values() for line in _lines(found, next(iter(nodes)), len(nodes))]


def _lines(by_finding: Mapping[Finding, Sequence[str]], first: str, count: int) -> list[Finding]:
    odd = {found: hosts for found, hosts in by_finding.items() if found.state is not State.OK}
    if not odd:
        return [found for found, hosts in by_finding.items() if hosts[0] == first]
    ordered = sorted(odd.items(), key=lambda item: [*State].index(item[0].state), reverse=True)  # the worst first
    lines = [_named(found, hosts, count) for found, hosts in ordered[:_SHOWN]]
    if rest := ordered[_SHOWN:]:
        found, hosts = rest[0][0], [host for _, several in rest for host in several]
        lines.append(Finding(found.name, found.state, f"likewise on {shown(hosts)}", found.remedy))
    return lines


def _named(found: Finding, hosts: Sequence[str], count: int) -> Finding:
    is_everywhere = len(hosts) == count
    if count == 1 or (is_everywhere and found.state is State.FALLBACK):
        return found
    where = f"all {count} nodes" if is_everywhere else shown(hosts)
    return Finding(found.name, found.state, f"{where}: {found.detail}", found.remedy)


def shown(names: Sequence[str]) -> str:
    """Return the first names, and how many there are besides: `n0, n1 and 14 more`."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"


def check_meeting(meeting: Meeting) -> list[Finding]:
    """Return what rank 0 learned when all ranks met."""
    ranks, times = meeting.ranks, meeting.times
    findings = [*_absent(meeting.absent), *check_nodes(ranks), *check_reach(meeting.unreached), *_errors(meeting)]
    if times:
        links = [link for time in times for link in time.links]
        findings += [check_clocks(ranks, [time.clock_s for time in times]), *check_rates(times)]
        findings += check_links(ranks, links, times[0].num_bytes)
    return findings


def _absent(ranks: Sequence[int]) -> list[Finding]:
    if not ranks:
        return []
    detail = f"rank{'s' * (len(ranks) > 1)} {shown([str(rank) for rank in ranks])} did not come within {JOIN_S} s"
    return [wrong("nodes", detail, "look for their errors in the log, and at their nodes (sinfo, nvidia-smi)")]


def _errors(meeting: Meeting) -> list[Finding]:
    """Return each error of gloo or NCCL with the ranks that have it. One rank that fails is seen by most others."""
    ranks: dict[str, list[str]] = {}
    for rank, error in meeting.errors:
        ranks.setdefault(shortened(" ".join(error.split()), _LONGEST_ERROR), []).append(meeting.ranks[rank].where)
    remedy = (
        "let nodes reach each other on all ports, and name the interface in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME; "
        "NCCL_DEBUG=INFO says more"
    )
    return [wrong("collectives", f"{shown(where)}: {error}", remedy) for error, where in [*ranks.items()][:_SHOWN]]


def check_rates(times: Sequence[Times]) -> list[Finding]:
    """Return the rates of collectives over all ranks. The slowest rank counts."""
    size, count = times[0].num_bytes, len(times)
    reduce, broadcast = (max(getattr(time, name) for time in times) for name in ("all_reduce", "broadcast"))
    on_wire = 2 * (count - 1) / count * size
    return [
        ok("all-reduce", f"{on_wire / reduce / 1e9:.2f} GB/s per rank, {rate_of(size, reduce)} over {count} ranks"),
        ok("broadcast", f"{size / broadcast / 1e9:.2f} GB/s, {rate_of(size, broadcast)} from rank 0"),
    ]


def check_nodes(ranks: Sequence[Rank]) -> list[Finding]:
    """Return whether all ranks have the same software, devices and free memory, and each a GPU of its own."""
    return [
        _nodes(ranks),
        *_alike("versions", ranks, lambda rank: [f"{name} {text}" for name, text in sorted(rank.versions.items())]),
        *_alike("devices", ranks, lambda rank: [rank.device]),
        *_own_gpus(ranks),
        _free_memory(ranks),
        *_shared_folder([rank for rank in ranks if rank.folder]),
    ]


def check_clocks(ranks: Sequence[Rank], clocks_s: Sequence[float]) -> Finding:
    """Return whether all ranks have the same time. clocks_s: their clocks, read at the same moment"""
    usual = median(clocks_s)
    far = max(range(len(ranks)), key=lambda number: abs(clocks_s[number] - usual))
    difference = clocks_s[far] - usual
    if abs(difference) <= _MOST_CLOCK_S:
        return ok("clocks", f"within {_MOST_CLOCK_S:.0f} s of each other")
    return hint(
        "clocks",
        f"{ranks[far].where} is {difference:+.1f} s from the median, so its logs and files have wrong times",
        "start a time service there (chrony, systemd-timesyncd)",
    )


def _nodes(ranks: Sequence[Rank]) -> Finding:
    first = {rank.host: rank for rank in reversed(ranks)}
    hosts = [f"{host} {rank.address} ({rank.interface})" for host, rank in reversed(first.items())]
    return ok("nodes", f"{len(ranks)} ranks on {len(first)} node{'s' * (len(first) > 1)}: {shown(hosts)}")


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


def _own_gpus(ranks: Sequence[Rank]) -> list[Finding]:
    """Return a reason for ranks without a GPU of their own on a node with GPUs: NCCL refuses two ranks on one GPU."""
    users: dict[tuple[str, str], list[Rank]] = {}
    for rank in ranks:
        if rank.device != "CPU":
            users.setdefault((rank.host, rank.gpu), []).append(rank)
    remedy = (
        "start one torchrun per node, no more ranks than GPUs, and let each rank see all of them (srun --gpus-per-node, not "
        "--gpus-per-task; one CUDA_VISIBLE_DEVICES)"
    )
    return [
        wrong(
            "GPUs of ranks",
            f"{_where(several)} {f'share {gpu}' if gpu else f'no GPU left of {several[0].device}'}",
            remedy,
        )
        for (_, gpu), several in users.items()
        if not gpu or len(several) > 1
    ]


def _shared_folder(firsts: Sequence[Rank]) -> list[Finding]:
    """Return a hint if nodes see different folders at output_dir."""
    others = [rank.host for rank in firsts if rank.folder != firsts[0].folder]
    if not others:
        return []
    return [
        hint(
            "output_dir",
            f"{shown(others)} and {firsts[0].host} see different folders there, and each node writes a part of a checkpoint",
            "put it on a file system that all nodes share",
        )
    ]


def _free_memory(ranks: Sequence[Rank]) -> Finding:
    usual = median(rank.free_bytes for rank in ranks)
    low = [rank for rank in ranks if rank.free_bytes < _LEAST_FREE * usual and (rank.gpu or rank.device == "CPU")]
    if not low:
        return ok("free memory", f"at least {min(r.free_bytes for r in ranks) / _GIB:.1f} GiB on every rank")
    return hint(
        "free memory",
        f"{shown([f'{rank.where} {rank.free_bytes / _GIB:.1f} GiB' for rank in low])}; the median is {usual / _GIB:.1f} GiB",
        "end what an earlier job left there (nvidia-smi, ps), or leave the node out (sbatch --exclude)",
    )
