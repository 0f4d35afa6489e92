"""A configuration against machines with and without room: each reason is found, with its numbers and its remedy."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from dapo_mcore.config.file import load_config
from dapo_mcore.config.schema import Config
from dapo_mcore.config.sglang import SGLangConfig
from dapo_mcore.doctor import run
from dapo_mcore.doctor.finding import Finding, State
from dapo_mcore.doctor.run import Here

CPU = Here(num_gpus=0, has_engine=False, has_ray=False, processes=None, local_ranks=1)
NODE = Here(num_gpus=8, has_engine=True, has_ray=True, processes=32, local_ranks=8)
GIB = 2**30
VALUES = 13_584
"""Parameters of the tests' model, see character_model.CONFIG: 2 · 128 · 16 + 16 outside the layers, and in each of 4 layers
16 · 16 + 16 of q, 2 · (16 · 8 + 8) of k and v, 16 · 16 of o, 3 · 16 · 32 of the MLP, and two norms of 16."""


def written(folder: Path, model: Path, *overrides: str) -> Config:
    rows = [{"prompt": "1+1=", "answer": "2", "data_source": "x"}] * 4
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "run.yaml").write_text(
        f"model: {{path: {model}, init: random}}\n"
        f"data: {{files: [{folder / 'train.jsonl'}], answer_key: answer, max_prompt_tokens: 16}}\n"
        f"output_dir: {folder / 'runs'}\n"
        "rollout: {max_response_tokens: 16, group_size: 2}\n"
        "batch: {max_tokens: 64}\nreward: {overlong: {cache: 4}}\n"
    )
    return load_config(folder / "run.yaml", overrides)


def wrong(found: list[Finding]) -> dict[str, Finding]:
    return {f.name: f for f in found if f.state is State.WRONG}


def test_a_run_that_fits_has_no_reason_against_it(tmp_path: Path, model_folder: Path) -> None:
    found = run.check_config(written(tmp_path, model_folder), CPU)
    assert [(f.name, f.state) for f in found] == [
        ("start", State.OK),
        ("data", State.OK),
        ("checkpoint space", State.OK),
    ]


def test_what_a_run_refuses_at_its_start_is_a_reason_with_the_runs_own_remedy(
    tmp_path: Path, model_folder: Path
) -> None:
    config = written(tmp_path, model_folder, "parallel.tensor_parallel=3")
    found = wrong(run.check_config(config, CPU))
    assert list(found) == ["start"]
    assert "tensor_parallel 3" in found["start"].detail
    assert found["start"].remedy
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1="}\n')
    found = wrong(run.check_config(written(tmp_path, model_folder, "data.answer_key=truth"), CPU))
    assert list(found) == ["data"]


def test_keys_that_need_transformer_engine_are_named_without_it(tmp_path: Path, model_folder: Path) -> None:
    keys = [
        "model.transformer_impl=transformer_engine",
        "model.dtype=bf16",
        "optimizer.offload_fraction=1",
        "model.fp8={}",
    ]
    config = written(tmp_path, model_folder, *keys)
    gpu_alone = Here(num_gpus=1, has_engine=False, has_ray=False, processes=None, local_ranks=1)
    found = run.check_extensions(config, gpu_alone)
    assert [f.detail.split(" needs it")[0] for f in found] == [
        "model.transformer_impl transformer_engine",
        "optimizer state on the host or in bf16",
        "model.fp8 on a GPU",
    ]
    assert all("dapo_mcore[te]" in f.remedy for f in found)
    assert len(run.check_extensions(config, CPU)) == 2, "FP8 is simulated on CPUs"
    assert run.check_extensions(config, NODE) == []


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
    assert run.count_values(config) == VALUES
    assert run.checkpoint_bytes(config, VALUES) == VALUES * per_value


def test_a_disk_must_hold_a_new_checkpoint_beside_those_that_are_kept(tmp_path: Path, model_folder: Path) -> None:
    keys = ["checkpoint.every=10", "checkpoint.keep=2"]
    config = written(tmp_path, model_folder, *keys)
    values = 10**9
    needed = 3 * 12 * values + 4 * values
    assert run.check_checkpoint_space(config, values, needed).state is State.OK
    found = run.check_checkpoint_space(config, values, needed - 1)
    assert found.state is State.WRONG
    assert "3 more of 11.2 GiB and an export of 3.7 GiB need 37.3 GiB" in found.detail
    assert "checkpoint.keep" in found.remedy
    for name in ("step_000010", "step_000020", "step_000030.partial"):
        (config.run_dir / "checkpoints" / name).mkdir(parents=True)
    assert run.check_checkpoint_space(config, values, 12 * values + 4 * values).state is State.OK
    never = written(tmp_path, model_folder, "checkpoint.at_end=false")
    assert run.check_checkpoint_space(never, values, 0).state is State.OK


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
        monkeypatch.setattr(run, "free_space", lambda folder, free=free: free)
        found = run.check_sync_space(config, VALUES)
        assert [f.state for f in found] == ([state] if needed else [])
    assert all(remedy in f.remedy for f in found)


def test_servers_need_open_files_for_their_requests() -> None:
    settings = SGLangConfig(num_servers=4, max_in_flight=1000)
    assert run.check_open_files(settings, 1024, 65536).state is State.OK
    found = run.check_open_files(settings, 1024, 4096)
    assert found.state is State.WRONG
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
    found = run.check_server_gpus(SGLangConfig(**keys), here)
    assert found.state is state
    assert detail in found.detail
    assert bool(found.remedy) == (state is State.WRONG)


def test_ray_and_folders_that_a_run_lacks_are_named(tmp_path: Path, model_folder: Path) -> None:
    config = written(tmp_path, model_folder, "reward.placement=ray", "reward.workers=1")
    assert [(f.name, f.remedy) for f in run.check_extensions(config, CPU)] == [("Ray", "pip install 'dapo_mcore[ray]'")]
    assert run.check_extensions(config, NODE) == []
    assert run.check_folder("output_dir", tmp_path / "runs" / "a") == []
    (found,) = run.check_folder("output_dir", tmp_path / "train.jsonl" / "a")
    assert (found.detail, "choose another output_dir" in found.remedy) == (f"{tmp_path}/train.jsonl is a file", True)


def test_ports_that_are_taken_or_given_to_clients_are_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        settings = SGLangConfig(base_port=port, num_servers=1)
        taken, given = run.check_ports(settings, CPU, f"{port} {port + 100}")
        assert (taken.state, str(port) in taken.detail, "base_port" in taken.remedy) == (State.WRONG, True, True)
        assert (given.state, f"base_port below {port - 1}" in given.remedy) == (State.HINT, True)
        assert run.check_url(f"http://127.0.0.1:{port}").state is State.OK
    assert [f.state for f in run.check_ports(settings, CPU, "1 2")] == [State.OK]
    assert run.check_ports(SGLangConfig(), CPU, "1 2")[0].state is State.OK
    assert run.check_url("http://127.0.0.1:99999").state is State.WRONG
    refused = run.check_url(f"http://127.0.0.1:{port}")
    assert (refused.state, "start the server" in refused.remedy) == (State.WRONG, True)


def test_keys_that_others_can_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "servers").mkdir()
    for name, mode in (("keys.json", 0o644), ("server-0.yaml", 0o600), ("server-0.log", 0o644)):
        (tmp_path / "servers" / name).touch()
        (tmp_path / "servers" / name).chmod(mode)
    (found,) = run.check_private_files(tmp_path)
    assert found.state is State.HINT
    assert found.remedy == f"chmod 600 {tmp_path}/servers/keys.json"


def test_servers_of_a_configuration_are_checked_as_a_whole(tmp_path: Path, model_folder: Path, monkeypatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    config = written(tmp_path, model_folder, "rollout.engine=sglang", "rollout.sglang.urls=[http://127.0.0.1:1]")
    found = {f.name: f.state for f in run.check_servers(config, CPU, VALUES)}
    assert found == {
        "open files": State.OK,
        "sync space": State.OK,
        "proxies": State.HINT,
        "servers": State.WRONG,
    }
