"""A configuration against nodes with and without room: each reason is found, with its numbers and its remedy."""

from __future__ import annotations

import resource
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dapo_mcore.config.sglang import SGLangConfig
from dapo_mcore.doctor import needs
from dapo_mcore.doctor.finding import State
from dapo_mcore.doctor.needs import Here
from tests.doctor.environments import CPU, GIB, NODE, written

VALUES = 13_584
"""Parameters of the tests' model, see character_model.CONFIG: 2 · 128 · 16 + 16 outside the layers, and in each of 4 layers
16 · 16 + 16 of q, 2 · (16 · 8 + 8) of k and v, 16 · 16 of o, 3 · 16 · 32 of the MLP, and two norms of 16."""
SECOND = replace(NODE, node=1)


@pytest.mark.parametrize(
    ("overrides", "per_value"),
    [
        ([], 4 + 4 + 4),
        (["model.dtype=bf16"], 2 + 4 + 4 + 4),
        (["model.dtype=bf16", "algo.kl.coef=0.1"], 2 + 4 + 4 + 4 + 2),
        (["model.dtype=bf16", "optimizer.exp_avg_dtype=bf16"], 2 + 4 + 2 + 4),
    ],
)
def test_a_checkpoint_has_weights_optimizer_and_reference(
    overrides, per_value, tmp_path: Path, model_folder: Path
) -> None:
    config = written(tmp_path, model_folder, *overrides)
    assert needs.count_values(config) == VALUES
    assert needs.checkpoint_bytes(config, VALUES) == VALUES * per_value


def test_a_disk_must_hold_a_new_checkpoint_beside_those_that_are_kept(tmp_path: Path, model_folder: Path) -> None:
    keys = ["checkpoint.every=10", "checkpoint.keep=2"]
    config = written(tmp_path, model_folder, *keys)
    values = 10**9
    needed = 3 * 12 * values + 4 * values
    assert needs.check_checkpoint_space(config, values, needed).state is State.OK
    found = needs.check_checkpoint_space(config, values, needed - 1)
    assert found.state is State.WRONG
    assert "3 more of 11.2 GiB and an export of 3.7 GiB need 37.3 GiB" in found.detail
    assert "checkpoint.keep" in found.remedy
    for name in ("step_000010", "step_000020", "step_000030.partial"):
        (config.run_dir / "checkpoints" / name).mkdir(parents=True)
    assert needs.check_checkpoint_space(config, values, 12 * values + 4 * values).state is State.OK
    every = written(tmp_path, model_folder, "checkpoint.every=10", "checkpoint.keep=null", "num_rollout_steps=70")
    assert "8 more of" in needs.check_checkpoint_space(every, values, 10**13).detail
    remedy = needs.check_checkpoint_space(every, values, 0).remedy
    assert remedy == "make room, choose another output_dir, or set checkpoint.keep"
    never = written(tmp_path, model_folder, "checkpoint.at_end=false")
    assert needs.check_checkpoint_space(never, values, 0).state is State.OK


@pytest.mark.parametrize(
    ("overrides", "needed", "remedy"),
    [
        (["rollout.sglang.sync=disk"], 2 * 4 * VALUES, "larger sync_dir"),
        (["rollout.sglang.sync=disk", "model.dtype=bf16"], 2 * 2 * VALUES, "larger sync_dir"),
        (["rollout.sglang.sync=tensor", "rollout.sglang.device=cpu"], 2 * 512 * 2**20, "docker run --shm-size"),
        (["rollout.sglang.sync=distributed"], None, ""),
        (["rollout.sglang.sync=tensor"], None, ""),
    ],
)
def test_a_sync_needs_room_for_two_versions_or_two_buckets(
    overrides, needed, remedy, tmp_path: Path, model_folder: Path, monkeypatch
) -> None:
    config = written(tmp_path, model_folder, "rollout.engine=sglang", *overrides)
    for free, state in ((needed or 0, State.OK), ((needed or 0) - 1, State.WRONG)):
        monkeypatch.setattr(needs, "free_space", lambda folder, free=free: free)
        found = needs.check_sync_space(config, VALUES)
        assert [f.state for f in found] == ([state] if needed else [])
    assert all(remedy in f.remedy for f in found)


def test_servers_need_open_files_for_their_requests() -> None:
    settings = SGLangConfig(num_servers=4, max_in_flight=1000)
    assert needs.check_connections(settings, 4, 1024, 65536).state is State.OK
    found = needs.check_connections(settings, 4, 1024, 4096)
    assert found.state is State.WRONG
    assert (
        "4032 connections (rollout.sglang.max_in_flight and 8 more per server) and 256 other files need 4288"
        in found.detail
    )
    assert "may open 4096" in found.detail
    assert "lower rollout.sglang.max_in_flight" in found.remedy


@pytest.mark.parametrize(
    ("keys", "here", "state", "detail"),
    [
        ({"device": "cpu"}, CPU, State.OK, "not needed"),
        ({}, CPU, State.WRONG, "there is no GPU"),
        ({"num_servers": 2, "tensor_parallel": 4, "colocated": True, "sync": "tensor"}, NODE, State.OK, "0 to 7 of 8"),
        ({"num_servers": 1}, NODE, State.WRONG, "after the first 8 of 8 GPUs"),
        ({"num_servers": 4, "first_gpu": 4}, NODE, State.OK, "4 to 7 of 8"),
        # 8 servers in turn on 4 nodes are 2 on each
        ({"num_servers": 8, "placement": "nodes", "host": "node", "first_gpu": 6}, NODE, State.OK, "6 to 7 of 8"),
    ],
)
def test_servers_need_gpus_beside_those_of_the_ranks(
    keys: dict[str, Any], here: Here, state: State, detail: str
) -> None:
    found = needs.check_server_gpus(SGLangConfig(**keys), here)
    assert found.state is state
    assert detail in found.detail
    assert bool(found.remedy) == (state is State.WRONG)


def test_folders_that_cannot_be_made_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert needs.check_folder("output_dir", tmp_path / "runs" / "a", made=2) == []
    (found,) = needs.check_folder("output_dir", tmp_path / "file" / "a")
    assert (found.detail, "choose another output_dir" in found.remedy) == (f"{tmp_path}/file is a file", True)


def test_a_file_in_place_of_output_dir_is_one_finding(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "runs").touch()
    (found,) = needs.check_node(written(tmp_path, model_folder), CPU)
    assert (found.name, found.state, found.detail) == ("output_dir", State.WRONG, f"{tmp_path}/runs is a file")


def test_a_folder_far_from_all_that_exists_may_be_on_a_file_system_that_is_not_mounted(
    tmp_path: Path, model_folder: Path, monkeypatch
) -> None:
    monkeypatch.setattr(needs, "free_space", lambda folder: 58 * GIB)
    disk = ["rollout.engine=sglang", "rollout.sglang.sync=disk"]
    config = written(tmp_path, model_folder, *disk, f"rollout.sglang.sync_dir={tmp_path}/lustre/sync")
    (found,) = needs.check_sync_space(config, VALUES)
    assert (found.state, found.detail) == (
        State.HINT,
        f"{tmp_path}/lustre/sync does not exist; it would be made in {tmp_path} (58.0 GiB free)",
    )
    near = written(tmp_path, model_folder, *disk, f"rollout.sglang.sync_dir={tmp_path}/sync")
    assert [found.state for found in needs.check_sync_space(near, VALUES)] == [State.OK]
    assert "output_dir" not in [found.name for found in needs.check_node(near, CPU)], "runs/NAME is made by a first run"
    typo = written(tmp_path, model_folder, f"output_dir={tmp_path}/scrtach/runs")
    found, space = needs.check_node(typo, CPU)
    assert (found.name, found.state, space.name) == ("output_dir", State.HINT, "checkpoint space")


def test_a_folder_has_the_same_identity_for_all_that_share_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert needs.identity(tmp_path / "a" / "runs") == needs.identity(tmp_path / "a" / "other")
    same_path = [needs.identity(tmp_path / name).split()[1:] for name in ("a", "b")]
    assert same_path[0] != same_path[1]


def test_ports_that_are_taken_or_given_to_clients_are_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        settings = SGLangConfig(base_port=port, num_servers=1)
        taken, given = needs.check_ports(settings, CPU, f"{port} {port + 100}")
        assert (taken.state, str(port) in taken.detail, "base_port" in taken.remedy) == (State.WRONG, True, True)
        assert (given.state, f"base_port below {port - 1}" in given.remedy) == (State.HINT, True)
    assert [f.state for f in needs.check_ports(settings, CPU, "1 2")] == [State.OK]
    assert needs.check_ports(SGLangConfig(), CPU, "1 2")[0].state is State.OK


def test_a_node_answers_for_the_servers_that_start_on_it(tmp_path: Path, model_folder: Path, monkeypatch) -> None:
    """Four nodes: server i starts on node i mod 4, beside rank 0 if placement is local, and elsewhere if it has a URL."""
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (512, 512))
    sglang = ["rollout.engine=sglang", "rollout.sglang.device=cpu"]
    spread = [*sglang, "rollout.sglang.placement=nodes", "rollout.sglang.host=node", "rollout.sglang.num_servers=6"]

    def names(here: Here, *keys: str) -> list[str]:
        return [found.name for found in needs.check_servers(written(tmp_path, model_folder, *keys), here, 1)]

    assert NODE.servers(SGLangConfig(placement="nodes", num_servers=6)) == range(0, 6, 4)
    assert [*SECOND.servers(SGLangConfig(placement="nodes", num_servers=6))] == [1, 5]
    everything = ["connections", "sync space", "servers' GPUs", "ports"]
    assert names(NODE, *spread) == names(SECOND, *spread) == everything
    assert names(replace(NODE, node=3), *spread, "rollout.sglang.num_servers=2") == []
    assert (names(NODE, *sglang), names(SECOND, *sglang)) == (everything, [])
    assert names(NODE, *sglang, "rollout.sglang.urls=[http://10.0.0.9:1]") == ["connections", "sync space"]
    config = written(tmp_path, model_folder, *spread, "rollout.sglang.max_in_flight=100")
    first, second = (needs.check_servers(config, here, 1)[0] for here in (NODE, SECOND))
    assert (first.state, second.state) == (State.WRONG, State.OK), (
        "rank 0 has 648 connections, a server 108, and 256 other files"
    )


def test_a_node_without_the_model_says_so_unless_the_run_does(tmp_path: Path, model_folder: Path) -> None:
    config = written(tmp_path, model_folder, f"model.path={tmp_path}/nothing")
    assert needs.check_node(config, NODE) == []
    (found,) = needs.check_node(config, SECOND)
    assert (found.name, found.state) == ("model", State.WRONG)
    assert f"{tmp_path}/nothing" in found.detail


def test_host_memory_is_compared_with_the_plan(tmp_path: Path, model_folder: Path) -> None:
    config = written(tmp_path, model_folder, "checkpoint.at_end=false", "sampling.gen_batch_prompts=512")
    here = Here(2, True, True, processes=4, local_ranks=2, gpu="NVIDIA H100 80GB HBM3", memory=64 * GIB)
    # two processes of 6 GiB; rank 0 has the rollouts besides
    first, second = (needs.host_parts(config, replace(here, node=node)) for node in (0, 1))
    assert second["processes"] == 12 * GIB
    assert second == {name: part for name, part in first.items() if name != "rollouts"} != first
    (enough,) = needs.check_host_memory(config, replace(here, node=1))
    assert (enough.state, "needs about 12.0 GiB (dapo-mcore plan)" in enough.detail) == (State.OK, True)
    (short,) = needs.check_host_memory(config, replace(here, node=1, memory=8 * GIB))
    assert (short.state, "12.0 GiB of it for processes, but processes here may use 8.0 GiB" in short.detail) == (
        State.HINT,
        True,
    )
    assert "sbatch --mem=0" in short.remedy
    assert needs.check_host_memory(config, CPU) == [], "nothing is known of CPUs"
    odd = written(tmp_path, model_folder, "parallel.tensor_parallel=3")
    assert needs.check_host_memory(odd, here) == [], "the run's own check refuses it"
