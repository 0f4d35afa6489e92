"""The command on this machine, as users start it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dapo_mcore.cli import main
from dapo_mcore.doctor import command
from dapo_mcore.doctor.installed import Import, Installed
from dapo_mcore.rollout.sglang.launch import interpreter
from tests.doctor.environments import environment, torch_with

CONFIG = """\
model: {{path: {model}, init: random}}
data: {{files: [{folder}/train.jsonl], answer_key: answer}}
output_dir: {folder}/runs
"""


@pytest.fixture
def config(tmp_path: Path, model_folder: Path) -> Path:
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1=", "answer": "2", "data_source": "x"}\n')
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.format(model=model_folder, folder=tmp_path))
    return path


@pytest.mark.skipif(torch.cuda.is_available(), reason="only without a CUDA device")
def test_a_machine_without_a_gpu_can_run_and_says_what_falls_back(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(config), "name=x", "--json", str(tmp_path / "doctor.json")]) == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith(f"✓ {config} can run here.")
    report = json.loads((tmp_path / "doctor.json").read_text())
    assert report["can_run"] is True
    assert report["versions"]["torch"] == torch.__version__
    states = {found["name"]: found["state"] for found in report["findings"]}
    expected = {
        "Python": "ok",
        "torch": "ok",
        "megatron-core": "ok",
        "Transformer Engine": "falls back",
        "NVIDIA's apex": "falls back",
        "fused Adam": "falls back",
        "flash-attn": "falls back",
        "Triton": "falls back",
        "GPUs": "falls back",
        "NCCL": "falls back",
        "start": "ok",
        "data": "ok",
        "checkpoint space": "ok",
    }
    assert {name: states[name] for name in expected} == expected


def _without_megatron() -> Installed:
    torch_facts = {"version": "2.11.0+cu130", "cuda": "13.0", "gpus": []}
    imports = {"torch": Import(facts=torch_facts)}
    return Installed(
        {"torch": "2.11.0+cu130"}.get, lambda name: False, lambda name: imports.get(name, Import("ImportError"))
    )


def test_status_1_names_what_a_run_lacks_and_leaves_the_configuration_unread(
    config: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "this_environment", _without_megatron)
    assert main(["doctor", str(config)]) == 1
    out = capsys.readouterr().out
    assert out.rstrip().endswith(f"✗ {config} cannot run here, for 1 reason.")
    assert "  megatron-core       not installed → pip install dapo_mcore again" in out
    assert "checkpoint space" not in out


def test_a_configuration_that_does_not_hold_ends_with_status_2_and_torchrun_gets_the_reason(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert main(["doctor", str(config), "algo.clip_hi=1"]) == 2
    assert "did you mean 'algo.clip_high'" in capsys.readouterr().err
    assert "algo.clip_high" in json.loads((tmp_path / "error.json").read_text())["message"]["message"]


def test_a_report_that_cannot_be_written_is_refused_before_the_examination(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def examine(*given: object) -> None:
        raise AssertionError("the nodes are examined")

    monkeypatch.setattr(command, "_examine", examine)
    assert main(["doctor", str(config), "--json", str(tmp_path / "no" / "doctor.json")]) == 2
    assert "doctor.json: No such file or directory; name a file in a folder" in capsys.readouterr().err
    with pytest.raises(AssertionError, match="examined"):
        main(["doctor", str(config), "--json", str(tmp_path / "doctor.json")])
    assert not (tmp_path / "doctor.json").exists()


def test_a_configuration_whose_servers_lack_sglang_cannot_run_whatever_else_is_missing(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(interpreter, "version_of", lambda python: None)
    whole = environment({"torch": "2.11.0", "megatron-core": "0.16.1"}, imports={"torch": torch_with()})
    monkeypatch.setattr(command, "this_environment", lambda: whole)
    (tmp_path / "train.jsonl").unlink()
    words = ["doctor", str(config), "rollout.engine=sglang", "rollout.sglang.device=cpu"]
    assert main(words) == 1
    out = capsys.readouterr().out
    assert "train.jsonl" in out and "but the run starts servers with it" in out
    assert out.rstrip().endswith(f"✗ {config} cannot run here, for 2 reasons.")
    assert main([*words, "rollout.sglang.urls=[http://127.0.0.1:1]"]) == 1
    assert "only rollout.engine embedded or servers at urls" in capsys.readouterr().out


def test_a_rank_that_cannot_meet_the_others_says_so(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(own: object) -> None:
        raise RuntimeError("[gloo] connect\ntimed out")

    monkeypatch.setattr(command, "meet", refuse)
    for name, value in {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert command.run(None, [], None) == 1
    error = capsys.readouterr().err
    assert "rank 3 on" in error
    assert "cannot meet the others: [gloo] connect timed out" in error
    assert "let nodes reach MASTER_ADDR" in error


def test_the_reason_is_handed_to_torchrun(config: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr(command, "this_environment", _without_megatron)
    assert command.run(config, [], None) == 1
    message = json.loads((tmp_path / "error.json").read_text())["message"]["message"]
    assert message.endswith(
        "for 1 reason. megatron-core: not installed; pip install dapo_mcore again, with its dependencies"
    )
