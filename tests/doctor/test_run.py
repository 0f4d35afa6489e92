"""A configuration against a job: each reason is found, with its numbers and its remedy."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from dapo_mcore.doctor import run
from dapo_mcore.doctor.finding import Finding, State
from dapo_mcore.doctor.needs import Here
from dapo_mcore.errors import ConfigError
from dapo_mcore.rollout.sglang.launch import interpreter
from dapo_mcore.rollout.sglang.sync import disk
from tests.doctor.environments import CPU, NODE, written


def wrong(found: list[Finding]) -> dict[str, Finding]:
    return {f.name: f for f in found if f.state is State.WRONG}


def test_a_run_that_fits_has_no_reason_against_it(tmp_path: Path, model_folder: Path) -> None:
    found = run.check_config(written(tmp_path, model_folder), CPU)
    assert [(f.name, f.state) for f in found] == [("start", State.OK), ("data", State.OK)]


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


def test_all_missing_files_are_named_at_once(tmp_path: Path, model_folder: Path) -> None:
    config = written(tmp_path, tmp_path / "no-model", "reward.function=no-reward.py:score")
    (tmp_path / "train.jsonl").unlink()
    found = run.check_config(config, CPU)
    assert [(f.name, f.state) for f in found] == [("start", State.WRONG)] * 3
    for finding, file in zip(found, ("no-model", "train.jsonl", "no-reward.py"), strict=True):
        assert file in finding.detail


def test_sglang_that_is_missing_is_not_said_again_with_the_data(
    tmp_path: Path, model_folder: Path, monkeypatch
) -> None:
    def missing(*given: object, **more: object) -> None:
        raise ConfigError("no SGLang; install it")

    monkeypatch.setattr(interpreter, "inspect_environment", missing)
    config = written(tmp_path, model_folder, "rollout.engine=sglang", "rollout.sglang.device=cpu")
    assert [found.detail for found in wrong(run.check_start(config, CPU)).values()] == ["no SGLang"]
    assert wrong(run.check_start(config, replace(CPU, has_sglang=False))) == {}


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


def test_keys_that_others_can_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "servers").mkdir()
    for name, mode in (("keys.json", 0o644), ("server-0.yaml", 0o600), ("server-0.log", 0o644)):
        (tmp_path / "servers" / name).touch()
        (tmp_path / "servers" / name).chmod(mode)
    (found,) = run.check_private_files(tmp_path)
    assert found.state is State.HINT
    assert found.remedy == f"chmod 600 {tmp_path}/servers/keys.json"


def test_ray_that_a_run_lacks_is_named(tmp_path: Path, model_folder: Path) -> None:
    config = written(tmp_path, model_folder, "reward.placement=ray", "reward.workers=1")
    assert [(f.name, f.remedy) for f in run.check_extensions(config, CPU)] == [("Ray", "pip install 'dapo_mcore[ray]'")]
    assert run.check_extensions(config, NODE) == []


def test_tools_of_this_machine_are_started(tmp_path: Path, model_folder: Path) -> None:
    calculator, own = (
        "{name: sum, function: calculator}",
        "{name: own, function: absent.py:f, parameters: {type: object}}",
    )
    (found,) = run.check_tools(written(tmp_path, model_folder, f"tools=[{calculator}]"))
    assert (found.state, found.detail) == (State.OK, "sum: started")
    (found,) = run.check_tools(written(tmp_path, model_folder, f"tools=[{calculator}, {own}]"))
    assert found.state is State.WRONG and "absent.py cannot be imported" in found.detail
    assert run.check_tools(written(tmp_path, model_folder)) == []
    elsewhere = written(tmp_path, model_folder, "tools=[{name: sum, function: calculator, placement: ray, workers: 1}]")
    assert run.check_tools(elsewhere) == []
    assert list(wrong(run.check_extensions(elsewhere, CPU))) == ["Ray"]


def test_a_server_must_listen_at_its_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert run.check_url(f"http://127.0.0.1:{port}").state is State.OK
    assert run.check_url("http://127.0.0.1:99999").state is State.WRONG
    refused = run.check_url(f"http://127.0.0.1:{port}")
    assert (refused.state, "start the server" in refused.remedy) == (State.WRONG, True)


def test_servers_on_other_nodes_must_see_the_folder_of_a_sync_by_disk(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "on_other_machines", lambda urls: [url for url in urls if "10.0.0.2" in url])
    keys = ["rollout.engine=sglang", "rollout.sglang.placement=nodes", "rollout.sglang.host=node"]
    config = written(tmp_path, model_folder, *keys, "rollout.sglang.sync_dir=/dev/shm")
    (found,) = run.check_shared_folder(config, ["10.0.0.1", "10.0.0.2"])
    assert (found.state, "1 of 2 servers" in found.detail, "all nodes see" in found.remedy) == (State.WRONG, True, True)
    assert run.check_shared_folder(config, ["10.0.0.1"]) == []
