"""The comparison of ranks and the merging of what nodes find, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dapo_mcore.doctor.finding import Finding, State, fallback, hint, ok, wrong
from dapo_mcore.doctor.links import Link
from dapo_mcore.doctor.meeting import Meeting, Times
from dapo_mcore.doctor.nodes import check_clocks, check_meeting, check_nodes, check_rates, merge
from tests.doctor.environments import ALIKE, GIB, job

MIB = 2**20


def test_alike_ranks_have_nothing_to_mend() -> None:
    times = tuple(Times(256 * MIB, 0.01, 0.01, (Link(number ^ 1, number, 0.01),), 1000.0) for number in range(6))
    found = check_meeting(Meeting(tuple(job()), times=times))
    names = ("nodes", "versions", "devices", "free memory", "clocks", "all-reduce", "broadcast", "links in a node")
    assert [(f.name, f.state) for f in found] == [(name, State.OK) for name in names]
    assert found[0].detail == "6 ranks on 3 nodes: node0 10.0.0.0 (eth0), node1 10.0.0.1 (eth0), node2 10.0.0.2 (eth0)"


def test_a_rank_that_differs_is_named_with_its_node() -> None:
    ranks = job()
    ranks[3] = replace(ranks[3], versions={**ALIKE, "torch": "2.12.0"}, free_bytes=20 * GIB)
    ranks[5] = replace(ranks[5], device="2 × NVIDIA A100", versions={"torch": "2.11.0"})
    found = {(f.name, f.state): f for f in check_nodes(ranks)}
    versions = [f.detail for f in check_nodes(ranks) if f.name == "versions"]
    assert versions == [
        "rank 3 on node1: torch 2.12.0, but 4 of 6 ranks have torch 2.11.0",
        "rank 5 on node2: no megatron-core 0.16.1, which 4 of 6 ranks have",
    ]
    assert found["devices", State.WRONG].detail == (
        "rank 5 on node2: 2 × NVIDIA A100, but 5 of 6 ranks have 2 × NVIDIA H100"
    )
    assert found["free memory", State.HINT].detail == "rank 3 on node1 20.0 GiB; the median is 79.0 GiB"
    assert "sbatch --exclude" in found["free memory", State.HINT].remedy
    clock = check_clocks(ranks, [1000.0] * 3 + [1090.0] + [1000.0] * 2)
    assert (clock.state, "rank 3 on node1 is +90.0 s from the median" in clock.detail) == (State.HINT, True)


def test_ranks_of_a_node_that_differ_alike_are_one_line() -> None:
    ranks = [
        replace(rank, versions={**ALIKE, "ray": "2.60"}) if rank.host == "node1" else rank for rank in job(per_node=3)
    ]
    assert [f.detail for f in check_nodes(ranks) if f.name == "versions"] == [
        "ranks 3, 4, 5 on node1: ray 2.60, but 6 of 9 ranks have none"
    ]


@pytest.mark.parametrize(
    ("gpus", "detail"),
    [
        (["GPU-0", "GPU-0"], "ranks 2, 3 on node1: share GPU-0"),
        (["GPU-0", ""], "rank 3 on node1: no GPU left of 2 × NVIDIA H100"),
    ],
)
def test_ranks_without_a_gpu_of_their_own_are_named(gpus: list[str], detail: str) -> None:
    ranks = job()
    ranks[2:4] = [replace(rank, gpu=gpu) for rank, gpu in zip(ranks[2:4], gpus, strict=True)]
    (found,) = [f for f in check_nodes(ranks) if f.state is State.WRONG]
    assert (found.detail, "--gpus-per-node" in found.remedy) == (detail, True)
    assert all(f.state is State.OK for f in check_nodes([replace(rank, device="CPU", gpu="") for rank in job()]))


def test_nodes_that_see_another_folder_are_named() -> None:
    ranks = [replace(rank, folder="" if rank.local else "/runs 7 1") for rank in job()]
    assert [f for f in check_nodes(ranks) if f.name == "output_dir"] == []
    ranks[4] = replace(ranks[4], folder="/runs 2 5")
    (found,) = [f for f in check_nodes(ranks) if f.name == "output_dir"]
    assert (found.state, found.detail[:36]) == (State.HINT, "node2 and node0 see different folder")
    assert "all nodes share" in found.remedy


def test_what_stops_a_meeting_is_a_reason() -> None:
    ranks = tuple(job())
    absent = check_meeting(Meeting(ranks[:2], absent=(2, 3)))[0]
    assert (absent.state, absent.detail) == (State.WRONG, "ranks 2, 3 did not come within 300 s")
    unreached = Meeting(ranks, unreached=(("node0", "node1", "10.0.0.1", "timed out"),))
    failed = Meeting(ranks, errors=((3, "[gloo]\n no interface"),))
    reasons = [[f for f in check_meeting(found) if f.state is State.WRONG] for found in (unreached, failed)]
    assert [[(f.name, f.detail) for f in found] for found in reasons] == [
        [("reach", "node0 cannot reach node1 at 10.0.0.1: timed out")],
        [("collectives", "rank 3 on node1: [gloo] no interface")],
    ]


def test_rates_count_the_slowest_rank_and_what_the_wire_carries() -> None:
    times = [Times(256 * MIB, 0.010, 0.004, (), 0)] * 5 + [Times(256 * MIB, 0.020, 0.005, (), 0)]
    reduce, broadcast = check_rates(times)
    # 2 · 5/6 · 256 MiB in 20 ms; 256 MiB in 5 ms
    assert reduce.detail == "22.37 GB/s per rank, 256 MiB in 20.0 ms over 6 ranks"
    assert broadcast.detail == "53.69 GB/s, 256 MiB in 5.0 ms from rank 0"


def merged(**nodes: list[Finding]) -> list[tuple[State, str]]:
    return [(found.state, found.detail) for found in merge(nodes)]


def test_what_is_in_order_everywhere_is_one_line() -> None:
    assert merged(n0=[ok("disk", "58 GiB")], n1=[ok("disk", "57 GiB")]) == [(State.OK, "58 GiB")]
    assert merged(n0=[hint("clock", "odd", "chrony")]) == [(State.HINT, "odd")], "one node needs no name"


def test_what_is_not_in_order_names_its_nodes_and_replaces_what_is() -> None:
    proxy, full = hint("proxies", "set", "unset"), wrong("disk", "full", "make room")
    assert merged(n0=[proxy, ok("disk", "58 GiB")], n1=[proxy, full], n2=[proxy, full]) == [
        (State.HINT, "all 3 nodes: set"),
        (State.WRONG, "n1, n2: full"),
    ]
    lacks = fallback("Ray", "not installed")
    assert merged(n0=[lacks], n1=[lacks]) == [(State.FALLBACK, "not installed")]
    assert merged(n0=[ok("Ray", "2.60")], n1=[lacks], n2=[ok("Ray", "2.60")]) == [(State.FALLBACK, "n1: not installed")]


def test_many_nodes_with_numbers_of_their_own_are_a_few_lines() -> None:
    nodes = {f"n{n}": [hint("disk", f"{n} GiB", "make room")] for n in range(100)}
    nodes["n7"] = [wrong("disk", "full", "make room")]
    found = merge(nodes)
    assert [f.detail for f in found[:4]] == ["n7: full", "n0: 0 GiB", "n1: 1 GiB", "n2: 2 GiB"]
    assert (found[4].state, found[4].detail) == (State.HINT, "likewise on n3, n4, n5, n6 and 92 more")
    same = merge({f"n{n}": [hint("clock", "odd", "chrony")] for n in range(100)} | {"m": []})
    assert [f.detail for f in same] == ["n0, n1, n2, n3 and 96 more: odd"]
