"""Which ranks try each other, and what is concluded from slow messages."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dapo_mcore.doctor.finding import State
from dapo_mcore.doctor.links import Link, check_links, partners, rounds, schedule
from tests.doctor.environments import job

MIB = 2**20


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 129, 1000])
def test_every_member_of_a_ring_sends_and_receives_in_a_number_of_rounds_that_does_not_grow(count: int) -> None:
    found = rounds(count)
    assert len(found) <= 15
    pairs = [pair for sending in found for pair in sending.items()]
    assert len(pairs) == len(set(pairs)) == sum(len(partners(number, count)) for number in range(count))
    for number in range(count):
        to, from_ = ({pair[1 - end] for pair in pairs if pair[end] == number} for end in (0, 1))
        assert to == from_ == set(partners(number, count)), "each pair is tried in both directions"
        assert len(to) >= min(2, count - 1)
    for sending in found:
        busy = [*sending, *sending.values()]
        assert len(busy) == len(set(busy)), "nobody does two things at once"


def test_nodes_are_tried_by_all_their_ranks_and_first_within_themselves() -> None:
    inside, *across = schedule(job(nodes=2, per_node=2))[1:]
    assert inside == {1: 0, 3: 2}, "both nodes at once"
    assert across == [{0: 2, 1: 3}, {2: 0, 3: 1}]


def times(slow: Callable[[int, int], bool], nodes: int = 5, per_node: int = 2) -> list[Link]:
    """Return all links of a job: 10 ms within a node and 50 ms between nodes, 400 ms if slow."""
    pairs = [pair for sending in schedule(job(nodes, per_node)) for pair in sending.items()]
    usual = {True: 0.010, False: 0.050}
    return [Link(a, b, 0.4 if slow(a, b) else usual[a // per_node == b // per_node]) for a, b in pairs]


def odd(slow: Callable[[int, int], bool], nodes: int = 5) -> list[str]:
    found = check_links(job(nodes), times(slow, nodes), 256 * MIB)
    assert all(f.remedy for f in found if f.state is State.HINT)
    return [f.detail for f in found if f.state is not State.OK]


def test_one_slow_link_is_told_from_a_slow_rank_and_a_slow_node() -> None:
    assert odd(lambda a, b: False) == []
    assert odd(lambda a, b: (a, b) == (2, 4)) == [
        "rank 2 on node1 to rank 4 on node2: 256 MiB in 400.0 ms, usual are 50.0 ms; with other partners both are fast"
    ]
    one_way = "node1 is slow: rank 2 there sends 256 MiB in 400.0 ms with most partners, usual are 50.0 ms"
    assert odd(lambda a, b: a == 2 and b != 3) == [one_way]
    both_ways = odd(lambda a, b: (a in (2, 3)) != (b in (2, 3)))
    assert both_ways == [
        f"node1 is slow: ranks 2, 3 there {verb} 256 MiB in 400.0 ms with most partners, usual are 50.0 ms"
        for verb in ("send", "receive")
    ]


@pytest.mark.parametrize("nodes", [3, 4])
def test_one_slow_node_of_few_is_named_although_it_is_an_end_of_most_links(nodes: int) -> None:
    found = odd(lambda a, b: (a in (2, 3)) != (b in (2, 3)), nodes)
    assert len(found) == 2
    assert all(detail.startswith("node1 is slow") for detail in found)


def test_of_two_nodes_both_are_named() -> None:
    assert odd(lambda a, b: (a, b) == (0, 2), nodes=2) == [
        "rank 0 on node0 to rank 2 on node1: 256 MiB in 400.0 ms, usual are 50.0 ms; of two alone it cannot be told which one "
        "is slow"
    ]


def test_links_are_compared_with_their_kind_and_a_few_milliseconds_are_noise() -> None:
    found = check_links(job(), times(lambda a, b: False, nodes=3), 256 * MIB)
    assert [(f.name, f.state) for f in found] == [("links in a node", State.OK), ("links of nodes", State.OK)]
    # 268,435,456 B in 10 ms
    assert found[0].detail == "26.84 GB/s, 256 MiB in 10.0 ms; the slowest of 6 takes 10.0 ms"
    noise = [Link(0, 1, 0.001), Link(1, 0, 0.0055)]
    assert [f.state for f in check_links(job(), noise, 4 * MIB)] == [State.OK]
