"""SGLang servers as child processes of the controller: their command, keys, start, end and last words.

Change here: how a server is started. Which of them serve is fleet.py. The servers' files lie in servers/ of the run's
folder: keys.json and server-N.yaml (both 0600: the keys are in them, and a command line is public), server-N.log, model/.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PretrainedConfig

from dapo_mcore.config_sglang import SGLangConfig
from dapo_mcore.errors import ConfigError
from dapo_mcore.rollout.server_api import OLDEST, Keys, parse_version

CPU_ARGS = {
    "attention-backend": "torch_native",
    "sampling-backend": "pytorch",
    "grammar-backend": "none",
    "disable-overlap-schedule": True,
    "max-total-tokens": 65536,
    "max-running-requests": 256,
}
"""What SGLang needs beside `device: cpu` to run without a GPU; its own guess of the cache's size takes most of memory."""

# What a launcher has set for the trainer is not for its servers; PYTHONPATH would let our `kernels/` pose as theirs.
_NOT_INHERITED = (
    "PYTHONPATH",
    "PYTHONDONTWRITEBYTECODE",
    "TRITON_INTERPRET",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
)
_NOT_INHERITED_PREFIXES = ("MASTER_", "TORCHELASTIC_", "GROUP_", "ROLE_", "TORCH_NCCL_")
_STOP_TIMEOUT_S = 5.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)

# run by the server's interpreter, which may be of another environment
_INSPECT = """
import importlib.metadata, importlib.util, json, pathlib
spec = importlib.util.find_spec("sglang")
models = sorted(p.stem for p in (pathlib.Path(spec.origin).parent / "srt/models").glob("*.py")) if spec else []
print(json.dumps([importlib.metadata.version("sglang") if spec else None, models]))
"""


class ServerProcess:
    """One server. It dies with this process, however that ends."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], folder: Path, name: str, url: str):
        self.url = url
        self._command, self._environment, self._folder = list(command), environment, folder
        self._log = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Starts it; it serves when /health says so. Its output goes to the end of the log."""
        with open(os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def ask_to_stop(self) -> None:
        if self.alive:
            self._process.terminate()

    def stop(self) -> None:
        """Ends it and its children: politely first, then at once. May be called twice."""
        if self._process is None:
            return
        self.ask_to_stop()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_TIMEOUT_S)
        _kill_group(self._process.pid)
        self._process.wait()

    def restart(self) -> None:
        self.stop()
        self.start()

    def last_words(self, count: int = 3) -> str:
        """The log's last lines, for an error message."""
        try:
            lines = self._log.read_text(errors="replace").strip().splitlines()[-count:]
        except OSError:
            lines = []
        return f"{' | '.join(lines) or 'it wrote nothing'} (see {self._log})"


def start_servers(
    settings: SGLangConfig, hf_config: PretrainedConfig, dtype: str, stop_token_ids: Sequence[int], folder: Path
) -> tuple[list[ServerProcess], Keys]:
    """The servers that `settings` ask for on this machine, starting, and their keys. They hold random weights.

    dtype  `float32` or `bfloat16`. Raises ConfigError: no SGLang, or one out of range, no GPU, too few, port taken.
    """
    models = _inspect_environment(settings)
    _check_devices(settings)
    ports = [_port(settings, number) for number in range(settings.num_servers)]
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    keys = _new_keys(folder)
    _write_model(hf_config, stop_token_ids, folder / "model")
    environment = _environment(settings, models, hf_config.model_type)
    servers = []
    for number, port in enumerate(ports):
        arguments = _arguments(settings, keys, folder, dtype, number, port)
        file = folder / f"server-{number}.yaml"
        _write_private(file, yaml.safe_dump(arguments))
        command = [_python(settings), "-P", "-m", "sglang.launch_server", "--config", str(file)]
        url = f"http://{f'[{settings.host}]' if ':' in settings.host else settings.host}:{port}"
        servers.append(ServerProcess(command, environment, folder, f"server-{number}", url))
    for server in servers:
        server.start()
    return servers, keys


def stop_servers(servers: Sequence[ServerProcess]) -> None:
    """Ends them together."""
    for server in servers:
        server.ask_to_stop()
    for server in servers:
        server.stop()


def read_keys(path: str | None) -> Keys:
    """The keys in a JSON file {"api_key": …, "admin_key": …} that nobody else can read; none for no path."""
    if path is None:
        return Keys()
    file = Path(path)
    try:
        mode = stat.S_IMODE(file.stat().st_mode)
        stored = json.loads(file.read_text(encoding="utf-8"))
        keys = Keys(stored.get("api_key"), stored.get("admin_key"))
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"rollout.sglang.key_file {path}: {error}; it holds api_key and admin_key as JSON") from error
    if mode & 0o077:
        raise ConfigError(f"rollout.sglang.key_file {path} has mode {mode:04o}; others could read it: chmod 600 {path}")
    return keys


def _arguments(settings: SGLangConfig, keys: Keys, folder: Path, dtype: str, number: int, port: int) -> dict[str, Any]:
    """The server's options. Weights come by the first update, and tokens need no tokenizer."""
    ours = {
        "model-path": str(folder / "model"),
        "load-format": "dummy",
        "skip-tokenizer-init": True,
        "dtype": dtype,
        "device": settings.device,
        "tp-size": settings.tensor_parallel,
        "host": settings.host,
        "port": port,
        "api-key": keys.api,
        "admin-api-key": keys.admin,
        "log-level": "warning",
    }
    given = {key.replace("_", "-"): value for key, value in settings.server_args.items()}
    # on a CPU base-gpu-id would name a NUMA node
    device = CPU_ARGS if settings.device == "cpu" else {"base-gpu-id": number * settings.tensor_parallel}
    return ours | device | given


def _environment(settings: SGLangConfig, models: Sequence[str], model_type: str) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _NOT_INHERITED and not name.startswith(_NOT_INHERITED_PREFIXES)
    }
    kept["HF_HUB_OFFLINE"] = "1"
    if settings.device == "cpu":
        kept["SGLANG_USE_CPU_ENGINE"] = "1"
        kept["OMP_NUM_THREADS"] = "1"  # more is many times slower for a model small enough for a CPU
        # importing all of them takes most of a small server's start, and CUDA packages
        kept["SGLANG_DISABLED_MODEL_ARCHS"] = ",".join(name for name in models if name != model_type)
    return kept


def _inspect_environment(settings: SGLangConfig) -> list[str]:
    """Names of SGLang's model modules. Raises ConfigError when the interpreter has no SGLang, or too old a one."""
    python = _python(settings)
    remedy = "give the interpreter of an environment that has it as rollout.sglang.python"
    try:
        done = subprocess.run([python, "-P", "-c", _INSPECT], capture_output=True, text=True, timeout=120, cwd="/")
        version, models = json.loads(done.stdout.splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{python} cannot be asked for SGLang: {error}; {remedy}") from error
    if version is None:
        raise ConfigError(f"{python} has no SGLang; {remedy}")
    check_version(parse_version(version), python)
    return models


def check_version(version: tuple[int, ...], where: str) -> None:
    """Nothing; raises ConfigError for a version that is too old."""
    if version < OLDEST:
        told, oldest = (".".join(map(str, numbers)) for numbers in (version, OLDEST))
        raise ConfigError(f"{where} has SGLang {told}, but weight updates need at least {oldest}; install a newer one")


def _check_devices(settings: SGLangConfig) -> None:
    if settings.device == "cpu":
        return
    needed, found = settings.num_servers * settings.tensor_parallel, torch.cuda.device_count()
    if not found:
        raise ConfigError(
            "rollout.sglang.device is cuda, but this machine has no CUDA device; set rollout.sglang.device cpu, or name "
            "servers on other machines in rollout.sglang.urls"
        )
    if needed > found:
        raise ConfigError(
            f"rollout.sglang.num_servers {settings.num_servers} × tensor_parallel {settings.tensor_parallel} = {needed} "
            f"GPUs, but this machine has {found}; lower either"
        )


def _port(settings: SGLangConfig, number: int) -> int:
    wanted = settings.base_port + number if settings.base_port else 0
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        with socket.create_server((settings.host, wanted), family=family) as listener:
            return listener.getsockname()[1]
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"a server cannot listen on rollout.sglang.host {settings.host} port {wanted}: {error}; choose another "
            "base_port, or leave it null for a free one"
        ) from error


def _python(settings: SGLangConfig) -> str:
    return settings.python or sys.executable


def _write_model(hf_config: PretrainedConfig, stop_token_ids: Sequence[int], folder: Path) -> None:
    """config.json alone. Without generation_config.json the server has no sampling defaults of its own."""
    config = hf_config.__class__.from_dict({**hf_config.to_dict(), "eos_token_id": list(stop_token_ids)})
    config.architectures = hf_config.architectures
    config.save_pretrained(folder)


def _new_keys(folder: Path) -> Keys:
    keys = Keys(secrets.token_urlsafe(32), secrets.token_urlsafe(32))
    _write_private(folder / "keys.json", json.dumps({"api_key": keys.api, "admin_key": keys.admin}))
    return keys


def _write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
