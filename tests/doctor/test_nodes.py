"""The comparison of ranks, by hand, and a real job of two processes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dapo_mcore.doctor.finding import State, hint
from dapo_mcore.doctor.nodes import Rank, Times, check_nodes, check_times, describe_rank
from dapo_mcore.errors import ConfigError
from tests.train.runs import python, torchrun

GIB = 2**30
MIB = 2**20
ALIKE = {"torch": "2.11.0", "megatron-core": "0.16.1"}


def job(nodes: int = 3, per_node: int = 2) -> list[Rank]:
    return [
        Rank(
            n, f"node{n // per_node}", f"10.0.0.{n // per_node}", "eth0", "NVIDIA H100", 79 * GIB, ALIKE, clock_s=1000.0
        )
        for n in range(nodes * per_node)
    ]


def test_alike_ranks_have_nothing_to_mend() -> None:
    found = check_nodes(job())
    assert [(f.name, f.state) for f in found] == [
        (name, State.OK) for name in ("nodes", "versions", "devices", "free memory", "clocks")
    ]
    assert found[0].detail == "6 ranks on 3 nodes: node0 10.0.0.0 (eth0), node1 10.0.0.1 (eth0), node2 10.0.0.2 (eth0)"


def test_a_rank_that_differs_is_named_with_its_node() -> None:
    ranks = job()
    ranks[3] = replace(ranks[3], versions={**ALIKE, "torch": "2.12.0"}, free_bytes=20 * GIB, clock_s=1090.0)
    ranks[5] = replace(ranks[5], device="NVIDIA A100", versions={"torch": "2.11.0"})
    found = {(f.name, f.state): f for f in check_nodes(ranks)}
    versions = [f.detail for f in check_nodes(ranks) if f.name == "versions"]
    assert versions == [
        "rank 3 on node1: torch 2.12.0, but 4 of 6 ranks have torch 2.11.0",
        "rank 5 on node2: no megatron-core 0.16.1, which 4 of 6 ranks have",
    ]
    assert found["devices", State.WRONG].detail == "rank 5 on node2: NVIDIA A100, but 5 of 6 ranks have NVIDIA H100"
    assert found["free memory", State.HINT].detail == "rank 3 on node1 20.0 GiB; the median is 79.0 GiB"
    assert "sbatch --exclude" in found["free memory", State.HINT].remedy
    assert "rank 3 on node1 is +90.0 s from the median" in found["clocks", State.HINT].detail


def test_ranks_of_a_node_that_differ_alike_are_one_line() -> None:
    ranks = [
        replace(rank, versions={**ALIKE, "ray": "2.60"}) if rank.host == "node1" else rank for rank in job(per_node=3)
    ]
    assert [f.detail for f in check_nodes(ranks) if f.name == "versions"] == [
        "ranks 3, 4, 5 on node1: ray 2.60, but 6 of 9 ranks have none"
    ]


def test_a_node_has_the_name_that_slurm_can_leave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("SLURMD_NODENAME", "gpu-17")
    own = describe_rank(ALIKE, [], "127.0.0.1")
    assert (own.where, own.address, own.interface) == ("rank 5 on gpu-17", "127.0.0.1", "lo")


def test_loopback_addresses_on_several_nodes_are_odd() -> None:
    ranks = [replace(rank, address="127.0.1.1", interface="lo") for rank in job()]
    assert (check_nodes(ranks)[0].state, "--rdzv-endpoint" in check_nodes(ranks)[0].remedy) == (State.HINT, True)
    assert check_nodes(ranks[:2])[0].state is State.OK


def test_other_nodes_worries_are_told_once_unless_rank_0_has_them_too() -> None:
    ranks = job()
    proxies, files = hint("proxies", "http_proxy set", "export no_proxy"), hint("open files", "at most 256", "ulimit")
    ranks[0], ranks[4] = replace(ranks[0], worries=(proxies,)), replace(ranks[4], worries=(proxies, files))
    assert check_nodes(ranks)[5:] == [hint("open files", "rank 4 on node2: at most 256", "ulimit")]


def test_rates_count_the_slowest_rank_and_what_the_wire_carries() -> None:
    times = [Times(256 * MIB, 0.010, 0.004, 0.003)] * 5 + [Times(256 * MIB, 0.020, 0.005, 0.003)]
    reduce, broadcast, *links = check_times(job(), times)
    # 2 · 5/6 · 256 MiB in 20 ms; 256 MiB in 5 ms
    assert reduce.detail == "256 MiB in 20.0 ms over 6 ranks; 22.37 GB/s per rank"
    assert broadcast.detail == "256 MiB in 5.0 ms from rank 0; 53.69 GB/s"
    assert [(f.name, f.state) for f in links] == [("links in a node", State.OK), ("links of nodes", State.OK)]


def test_a_slow_link_is_named_by_both_ends_and_compared_with_its_kind() -> None:
    links = [0.050, 0.003, 0.050, 0.003, 0.400, 0.003]  # ranks 0, 2 and 4 receive from another node
    times = [Times(256 * MIB, 0.4, 0.4, link) for link in links]
    (slow,) = [f for f in check_times(job(), times) if f.state is not State.OK]
    assert slow.detail == "from rank 3 on node1 to rank 4 on node2 256 MiB in 400.0 ms, the median of 3 50.0 ms"
    assert "node1 and node2" in slow.remedy


def test_times_of_a_few_milliseconds_are_noise() -> None:
    times = [Times(4 * MIB, 0.01, 0.01, link) for link in (0.001, 0.001, 0.001, 0.001, 0.0055, 0.001)]
    assert [f for f in check_times(job(), times) if f.state is not State.OK] == []


def test_a_rank_that_sees_too_few_gpus_says_what_to_ask_of_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(ConfigError, match=r"LOCAL_RANK is 3, but this process sees 1 GPUs; .*--gpus-per-node"):
        describe_rank({}, [], "127.0.0.1")


def test_two_processes_meet_and_time_their_collectives(tmp_path: Path) -> None:
    """Through a proxy that does not exist: no call between the ranks may take it."""
    command = ("-m", "dapo_mcore.cli", "doctor", "--json", str(tmp_path / "doctor.json"))
    done = python(tmp_path, *torchrun(2), *command, merge=True, http_proxy="http://127.0.0.1:1")
    assert done.returncode == 0, done.stdout
    report = json.loads((tmp_path / "doctor.json").read_text())
    assert [rank["rank"] for rank in report["ranks"]] == [0, 1]
    assert all(rank["all_reduce"] > 0 and rank["broadcast"] > 0 and rank["link"] > 0 for rank in report["ranks"])
    states = {found["name"]: found["state"] for found in report["findings"]}
    assert states["versions"] == states["all-reduce"] == "ok"
    assert states["proxies"] == "hint"
    assert done.stdout.count("links in a node") == 1, "rank 0 alone prints"
