"""Ranks in threads that share a store, and a real job of two processes that stand for two nodes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from dapo_mcore.doctor import meeting
from dapo_mcore.doctor.finding import wrong
from dapo_mcore.doctor.meeting import Meeting, Times
from dapo_mcore.doctor.rank import Rank
from tests.doctor.environments import job, written
from tests.train.runs import environment

TIMES = Times(4, 1.0, 1.0, (), 0.0)


def meet_in_threads(ranks: list[Rank], size: int | None = None) -> list[Meeting]:
    """Return what each rank learns, of a job of `size` ranks."""
    store, size = dist.HashStore(), size or len(ranks)
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(lambda rank: meeting.meet_at(store, rank, size, join_s=0.5), ranks))


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[Rank]:
    """Return three ranks, each on a node of its own, that would time nothing but succeed."""
    monkeypatch.setattr(meeting, "_time_all", lambda store, own, places: TIMES)
    monkeypatch.setattr(meeting, "_REACH_S", 0.3)
    return [replace(rank, address="127.0.0.1", gloo="127.0.0.1") for rank in job(nodes=3, per_node=1)]


def test_rank_0_learns_everything_and_the_others_nothing(nodes: list[Rank]) -> None:
    first, *others = meet_in_threads(nodes)
    assert [rank.host for rank in first.ranks] == ["node0", "node1", "node2"]
    assert (first.times, first.absent, first.unreached, first.errors) == ((TIMES,) * 3, (), (), ())
    assert others == [Meeting(), Meeting()]


def test_ranks_that_do_not_come_are_named_in_time(nodes: list[Rank]) -> None:
    first, _ = meet_in_threads([nodes[0], nodes[2]], size=4)
    assert (first.absent, len(first.ranks), first.times) == ((1, 3), 2, ())


def test_an_address_that_two_nodes_cannot_reach_is_found_before_anything_hangs(nodes: list[Rank], monkeypatch) -> None:
    monkeypatch.setattr(meeting, "_time_all", None)
    nodes[1] = replace(nodes[1], gloo="192.0.2.1")  # an address that nobody has
    first, *_ = meet_in_threads(nodes)
    assert sorted((a, b, c) for a, b, c, _ in first.unreached) == [
        ("node0", "node1", "192.0.2.1"),
        ("node2", "node1", "192.0.2.1"),
    ]
    assert all(error for *_, error in first.unreached)


@pytest.mark.parametrize(
    "change",
    [
        {"gpu": "GPU-0", "host": "node0"},
        {"gpu": ""},
        {"device": "CPU", "gpu": ""},
        {"findings": {"machine": (wrong("GLOO_SOCKET_IFNAME", "'^lo' fits none", "unset it"),)}},
    ],
)
def test_ranks_that_cannot_send_alike_do_not_try(nodes: list[Rank], change: dict[str, Any], monkeypatch) -> None:
    monkeypatch.setattr(meeting, "_time_all", None)
    first, *_ = meet_in_threads([*nodes[:2], replace(nodes[2], **change)])
    assert (len(first.ranks), first.times, first.errors) == (3, (), ())


def test_the_error_of_each_rank_reaches_rank_0(nodes: list[Rank], monkeypatch) -> None:
    def fail(store: object, own: Rank, places: object) -> Times:
        if own.rank == 1:
            raise RuntimeError("[gloo] no interface ^lo")
        return TIMES

    monkeypatch.setattr(meeting, "_time_all", fail)
    first, *_ = meet_in_threads(nodes)
    assert (first.errors, first.times) == (((1, "[gloo] no interface ^lo"),), ())


def test_two_nodes_meet_name_what_one_of_them_lacks_and_time_their_link(tmp_path: Path, model_folder: Path) -> None:
    """Two processes whose Slurm calls them n0 and n1. n1 has a proxy, which does not exist, and a port that is taken."""
    with socket.create_server(("", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as master:
        ports = {"base_port": taken.getsockname()[1] - 1, "num_servers": 2, "placement": "nodes", "host": "node"}
        keys = [
            "rollout.engine=sglang",
            "rollout.sglang.device=cpu",
            *(f"rollout.sglang.{k}={v}" for k, v in ports.items()),
        ]
        written(tmp_path, model_folder)
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(master.getsockname()[1]), "WORLD_SIZE": "2"}
        master.close()
        command = [sys.executable, "-m", "dapo_mcore.cli", "doctor", "run.yaml", *keys, "--json", "doctor.json"]
        started = [
            subprocess.Popen(
                command,
                cwd=tmp_path,
                env=environment(**address, **own, LOCAL_RANK="0", LOCAL_WORLD_SIZE="1"),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for own in (
                {"RANK": "0", "SLURMD_NODENAME": "n0"},
                {"RANK": "1", "SLURMD_NODENAME": "n1", "http_proxy": "http://127.0.0.1:1"},
            )
        ]
        outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [1, 0], outputs
    assert outputs[1] == "", "rank 0 alone prints"
    report = json.loads((tmp_path / "doctor.json").read_text())
    found = {finding["name"]: finding for finding in reversed(report["findings"])}  # of one name, the worst comes first
    assert (found["ports"]["state"], found["ports"]["detail"][:4]) == ("wrong", "n1: ")
    assert str(ports["base_port"] + 1) in found["ports"]["detail"]
    assert (found["proxies"]["state"], found["proxies"]["detail"][:4]) == ("hint", "n1: ")
    assert {found[name]["state"] for name in ("versions", "all-reduce", "clocks", "checkpoint space")} == {"ok"}
    assert [record["host"] for record in report["ranks"]] == ["n0", "n1"]
    links = [link for record in report["ranks"] for link in record["links"]]
    assert [(link["sender"], link["receiver"]) for link in links] == [(1, 0), (0, 1)]
    assert all(link["seconds"] > 0 for link in links)
