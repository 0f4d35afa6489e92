"""What nodes learn of each other, without processes: one object per node."""

from __future__ import annotations

import os
import threading
from collections import Counter
from pathlib import Path

import pytest

from dapo_mcore.process.exchange import Disk, Exchange
from dapo_mcore.process.hang import RankState


class Nodes:
    """The exchanges of all nodes of a job, and their common clock."""

    def __init__(self, folder: Path, count: int):
        self.now = 0.0
        self.all = [
            Exchange(folder / "shared", node, count, 180.0, lambda: self.now, Disk(), interval_s=1e9)
            for node in range(count)
        ]

    def tell(self, *nodes: int) -> None:
        for node in nodes:
            self.all[node].tell([RankState(node, f"n{node}", 100, "train", "", 9, 1.0, "runs", 1.0)])

    def seen(self, node: int) -> list[tuple[int, str]]:
        return [(state.rank, state.condition) for state in self.all[node].others()]


def test_node_0_judges_and_node_1_if_node_0_is_silent(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path, 4)
    for now in (0.0, 100.0):
        nodes.now = now
        nodes.tell(0, 1, 2, 3)
        assert nodes.seen(0) == [(1, "runs"), (2, "runs"), (3, "runs")]
        assert nodes.seen(1) == [(0, "runs")] and nodes.seen(2) == nodes.seen(3) == []
    assert [node.leads for node in nodes.all] == [True, False, False, False]
    nodes.now = 281.0
    nodes.tell(1, 2)
    assert nodes.seen(0) == [(1, "runs"), (2, "runs"), (3, "silent")]
    assert nodes.seen(1) == [(0, "silent"), (2, "runs"), (3, "runs")]  # it has never looked at node 3 before
    assert [node.leads for node in nodes.all] == [True, True, False, False]


def test_nodes_are_not_silent_because_the_own_disk_has_not_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = Nodes(tmp_path, 2)
    nodes.tell(1)
    assert nodes.seen(0) == [(1, "runs")]
    nodes.now = 1000.0
    later = threading.TIMEOUT_MAX
    monkeypatch.setattr("time.monotonic", lambda: later)
    assert nodes.seen(0) == [(1, "runs")]
    nodes.now = 1181.0
    assert nodes.seen(0) == [(1, "silent")]


def test_a_round_costs_few_operations_and_rounds_of_many_nodes_are_further_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    intervals = [Exchange(tmp_path, 0, count, 180.0, float, Disk()).interval_s for count in (2, 16, 40, 128)]
    assert intervals == [5.0, 5.0, 5.0, 16.0]
    nodes = Nodes(tmp_path, 8)
    nodes.tell(*range(8))
    counts: Counter[str] = Counter()

    def counted(name: str) -> None:
        function = getattr(os, name) if hasattr(os, name) else getattr(Path, name)
        owner = os if hasattr(os, name) else Path
        monkeypatch.setattr(owner, name, lambda *given, **more: (counts.update([name]), function(*given, **more))[1])

    for name in ("mkdir", "replace", "stat", "write_text", "read_bytes"):
        counted(name)
    nodes.tell(*range(8))
    for node in range(8):
        nodes.seen(node)
        assert not nodes.all[node].has("alarm")
    assert counts == {"write_text": 8, "replace": 8, "read_bytes": 7 + 1, "stat": 8}


def test_a_disk_that_does_not_answer_keeps_nobody_waiting_and_the_node_judges_its_own_ranks(tmp_path: Path) -> None:
    disk = Disk(patience_s=0.05)
    exchange = Exchange(tmp_path, 3, 4, 180.0, lambda: 0.0, disk)
    os.mkfifo(tmp_path / "verdict.json")  # reading it waits for a writer
    assert exchange.read("verdict.json") == [None] and disk.is_stuck and exchange.leads
    exchange.tell([])
    assert not exchange.has("verdict.json") and not (tmp_path / "node-3.json").exists()
    (tmp_path / "verdict.json").write_text("[]")
    while disk.is_stuck:
        pass
    assert exchange.has("verdict.json") and not exchange.leads


def test_a_late_node_leaves_no_folder_after_the_end_of_the_job(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path, 2)
    for _ in range(2):
        nodes.tell(0, 1)
    nodes.all[0].remove()
    nodes.tell(1)
    assert list(tmp_path.iterdir()) == []
