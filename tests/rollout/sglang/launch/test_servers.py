"""Servers that a run starts: their options, keys, ports and GPUs, and the errors at start."""

from __future__ import annotations

import json
import os
import socket
import stat
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from dapo_mcore.config.sglang import SGLangConfig
from dapo_mcore.data.stops import StopTexts
from dapo_mcore.errors import ConfigError
from dapo_mcore.rollout.sglang.launch import servers
from tests.rollout.sglang.fake_server import fake_python
from tests.rollout.sglang.serving import (
    STOP,
    engine,
    key_file,
    wait_for,
)
from tests.rollout.spelling import speller


def start(folder: Path, **changes: Any) -> None:
    with engine(folder, **changes):
        pass


def test_an_environment_with_an_old_sglang_or_none_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(ConfigError, match=r"has SGLang 0\.5\.14, but weight updates need at least 0\.5\.15"):
        start(tmp_path, python=fake_python(tmp_path, "0.5.14"))
    with pytest.raises(ConfigError, match="has no SGLang; give the interpreter of an environment that has it"):
        start(tmp_path, python=sys.executable)
    with pytest.raises(ConfigError, match=r"cannot be asked for SGLang.*No such file"):
        start(tmp_path, python=tmp_path / "nowhere")
    assert not (tmp_path / "servers").exists()


def test_an_unknown_option_is_refused_before_anything_starts(tmp_path):
    """A server itself would say so only after 28 s. An option that only SGLang's parser knows is accepted."""
    told = r"server_args holds mem-fraction, no-such, but SGLang 0\.5\.21 of .* mem-fraction: mem-fraction-static; no-such: "
    with pytest.raises(ConfigError, match=told):
        start(tmp_path, server_args={"mem_fraction": 0.8, "no-such": 1, "of-a-plugin": 1})
    with pytest.raises(ConfigError, match="disable-cuda-graph takes true or false, not 'decode'"):
        start(tmp_path, server_args={"disable-cuda-graph": "decode"})
    assert not list(tmp_path.glob("servers/*.log"))


def test_every_kind_of_option_reaches_the_server(tmp_path):
    """Also those that SGLang refuses in its YAML file, so that file has only the keys."""
    given = {"--mem_fraction_static": -0.5, "disable-cuda-graph": True, "cuda-graph-bs-decode": [1, 2]}
    given |= {"lora-strict-loading": False, "log-level": "error", "max-running-requests": None}
    with engine(tmp_path, server_args=given | {"max-total-tokens": 100}):
        written = (tmp_path / "servers/server-0.args").read_text().splitlines()
    expected = ["--log-level=error", "--max-total-tokens=100", "--mem-fraction-static=-0.5", "--disable-cuda-graph"]
    assert set(expected) < set(written) and "--no-lora-strict-loading" in written
    assert written[written.index("--cuda-graph-bs-decode") :][:3] == ["--cuda-graph-bs-decode", "1", "2"]
    assert not any("max-running-requests" in word for word in written)


def test_the_error_names_a_port_that_is_taken(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"host 127.0.0.1 port {port}: .*in use.*; choose another base_port"):
            start(tmp_path, base_port=port)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_machine_without_a_gpu_needs_device_cpu(tmp_path):
    with pytest.raises(ConfigError, match=r"no CUDA device; set rollout\.sglang\.device cpu"):
        start(tmp_path, device="cuda")


def test_more_gpus_than_the_machine_has_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    servers.check_devices(SGLangConfig(tensor_parallel=4), num_servers=2)
    with pytest.raises(ConfigError, match=r"num_servers 3 × tensor_parallel 4 = 12 GPUs after the first 0 of .* has 8"):
        servers.check_devices(SGLangConfig(tensor_parallel=4), num_servers=3)
    with pytest.raises(ConfigError, match=r"= 4 GPUs after the first 6 of this machine, which has 8; .*colocated true"):
        servers.check_devices(SGLangConfig(tensor_parallel=4), num_servers=1, first_gpu=6)


def test_servers_that_a_job_cannot_hold_are_refused():
    shared = SGLangConfig(num_servers=8, tensor_parallel=2, colocated=True, sync="tensor")
    servers.check_shared_gpus(shared, num_ranks=16)
    with pytest.raises(ConfigError, match=r"8 × tensor_parallel 2 = 16 GPUs, but the trainer has 15 to share"):
        servers.check_shared_gpus(shared, num_ranks=15)
    with pytest.raises(ConfigError, match=r"= 16 GPUs, but placement local .* which has 8; set placement nodes"):
        servers.check_node_gpus(shared, per_node=8)
    nodes = shared.model_copy(update={"placement": "nodes", "host": "node"})
    servers.check_node_gpus(nodes, per_node=2)
    with pytest.raises(ConfigError, match=r"tensor_parallel 2: a server is on one node, which has 1 GPUs"):
        servers.check_node_gpus(nodes, per_node=1)
    servers.check_shared_gpus(shared.model_copy(update={"device": "cpu"}), num_ranks=1)


def test_a_server_divides_the_attention_heads():
    servers.check_heads(SGLangConfig(tensor_parallel=4), num_heads=40)
    with pytest.raises(
        ConfigError, match=r"tensor_parallel 3 does not divide the model's 40 attention heads; set it 2, or"
    ):
        servers.check_heads(SGLangConfig(tensor_parallel=3), num_heads=40)


def test_the_error_of_a_server_that_ends_at_start_has_its_last_words(tmp_path):
    script = fake_python(tmp_path)
    fails = """if [ "$2" = -m ]; then echo "no such flag" >&2; exit 1; fi\n"""
    script.write_text(script.read_text().replace("FAKE_VERSION", f"{fails}FAKE_VERSION", 1))
    with pytest.raises(ConfigError, match=r"ended while it started: no such flag \(see .*server-0.log\)"):
        start(tmp_path, python=script)


def test_keys_are_random_private_and_not_on_the_command_line(tmp_path):
    with engine(tmp_path, num_servers=2) as made:
        folder = tmp_path / "servers"
        private = ["keys.json", *(f"server-{number}.{kind}" for number in range(2) for kind in ("yaml", "args", "log"))]
        assert {stat.S_IMODE((folder / name).stat().st_mode) for name in private} == {0o600}
        keys = json.loads((folder / "keys.json").read_text())
        assert len(set(keys.values())) == 2 and min(map(len, keys.values())) >= 32
        command = Path(f"/proc/{made.pool.servers[0].process.pid}/cmdline").read_text()
        assert "launch_server" in command and not any(key in command for key in keys.values())
        arguments = (folder / "server-1.args").read_text().splitlines()
        assert {"--host=127.0.0.1", "--load-format=dummy", "--skip-tokenizer-init"} <= set(arguments)
        assert {"--attention-backend=torch_native", "--max-total-tokens=40000"} <= set(arguments)
        assert set(yaml.safe_load((folder / "server-1.yaml").read_text())) == {"api-key", "admin-api-key"}
        assert json.loads((folder / "model/config.json").read_text())["eos_token_id"] == [STOP]


def test_servers_that_look_for_texts_have_the_tokenizer(tmp_path):
    with engine(tmp_path, stop_texts=StopTexts(["*+"], speller(16)), num_servers=1):
        folder = tmp_path / "servers"
        assert "skip-tokenizer-init" not in (folder / "server-0.args").read_text()
        made = AutoTokenizer.from_pretrained(folder / "model")
        assert made.encode("*+", add_special_tokens=False) == [9, 10] and made.decode([9, 10]) == "*+"


def test_servers_inherit_no_variables_of_the_launcher_and_no_python_path(monkeypatch):
    hidden = {"RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "PYTHONPATH", "TRITON_INTERPRET", "RAY_AUTH_TOKEN"}
    hidden |= {"SLURM_JOB_ID", "SLURMD_NODENAME", "SRUN_DEBUG", "PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK"}
    hidden |= {"http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"}  # a server asks itself by HTTP while it starts
    for name in hidden:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    environment = servers.server_environment(SGLangConfig(device="cpu"), ["llama", "qwen2"], "qwen2")
    assert environment["CUDA_VISIBLE_DEVICES"] == "3" and environment["OMP_NUM_THREADS"] == "1"
    assert environment["SGLANG_DISABLED_MODEL_ARCHS"] == "llama"
    assert not hidden & set(environment)


def test_a_key_file_that_others_can_read_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"mode 0644; others could read it: chmod 600"):
        servers.read_keys(key_file(tmp_path, "a", "b", mode=0o644))
    with pytest.raises(ConfigError, match="it holds api_key and admin_key as JSON"):
        servers.read_keys(str(tmp_path / "none.json"))


def test_nobody_else_can_bind_a_reserved_port_before_or_between_starts_of_its_server():
    with servers.reserve_port(SGLangConfig(), "127.0.0.1", 0) as port:
        for _ in range(2):
            with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
                stranger.bind(port.getsockname())
            socket.create_server(port.getsockname()).close()


def test_an_engine_that_cannot_start_stops_the_servers_it_started(tmp_path):
    """The second server ends while the first one is up."""
    script, was_up = fake_python(tmp_path), tmp_path / "up"
    fails = f"""case "$*" in *server-1.yaml*) while [ ! -e "{was_up}" ]; do sleep 0.1; done; exit 1;; esac\n"""
    script.write_text(script.read_text().replace("FAKE_VERSION", f"{fails}FAKE_VERSION", 1))
    first = tmp_path / "servers/server-0.yaml"

    def tell_when_up() -> None:
        wait_for(lambda: first.exists() and _running(first), 60)
        was_up.touch()

    watcher = threading.Thread(target=tell_when_up)
    watcher.start()
    with pytest.raises(ConfigError, match="ended while it started"):
        start(tmp_path, python=script, num_servers=2)
    watcher.join()
    assert was_up.exists() and not _running(first)


def _running(file: Path) -> bool:
    """Return True if a process has `file` on its command line."""
    return any(str(file) in _command(pid) for pid in os.listdir("/proc") if pid.isdigit())


def _command(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
