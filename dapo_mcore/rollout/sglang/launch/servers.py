"""The SGLang servers that a run starts: command line, environment, keys and model folder, and the devices they need.

Change here: with which options a server is started. The process itself is in process.py, servers on other nodes are in
node_servers.py and ray_servers.py. The run's folder has these files of the servers in servers/: keys.json and server-N.yaml
(both of mode 0600: they hold the keys, and everybody can see a command line), server-N.args (the options on the command line),
server-N.log and model/.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dapo_mcore.config.sglang import SGLangConfig
from dapo_mcore.errors import ConfigError
from dapo_mcore.rollout.sglang import server_side
from dapo_mcore.rollout.sglang.client.api import Keys
from dapo_mcore.rollout.sglang.launch.interpreter import Installed, command_line, inspect_environment, python_of
from dapo_mcore.rollout.sglang.launch.process import ServerProcess

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CPU_ARGS = {
    "attention-backend": "torch_native",
    "sampling-backend": "pytorch",
    "grammar-backend": "none",
    "disable-overlap-schedule": True,
    "max-total-tokens": 65536,
    "max-running-requests": 256,
}
"""Options that SGLang needs besides `device: cpu` to run without a GPU. Its own guess of the cache size takes most of memory."""
DELTA_LOADER = "dapo_mcore_delta.load"
"""The loader of changed values, as a server finds it in the folder server_side/."""
FP8_BLOCK = 128
"""Rows and columns of a block of an FP8 matrix that share one scale."""

# A launcher sets these for the trainer, not for its servers. PYTHONPATH would let our `kernels/` shadow theirs. A server calls
# itself while it starts, and a proxy would not find it.
_NOT_INHERITED = (
    "PYTHONPATH",
    "PYTHONDONTWRITEBYTECODE",
    "TRITON_INTERPRET",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    *(name for proxy in ("http_proxy", "https_proxy", "all_proxy") for name in (proxy, proxy.upper())),
)
_NOT_INHERITED_PREFIXES = (
    "MASTER_",
    "TORCHELASTIC_",
    "GROUP_",
    "ROLE_",
    "TORCH_NCCL_",
    "RAY_",
    "SLURM",
    "SRUN_",
    "PMI_",
    "PMIX_",
    "OMPI_",
)


@dataclass(frozen=True)
class ServerPlan:
    """What a machine needs to start its servers: plain data that can be sent there.

    model               content of config.json.
    dtype               `float32` or `bfloat16`, of weights and arithmetic.
    folder              for configuration, keys and logs.
    continues_requests  requests in flight must continue after a weight update.
    tokenizer           content of tokenizer.json, if the servers must find texts; else empty.
    """

    settings: SGLangConfig
    keys: Keys
    model: dict[str, Any]
    dtype: str
    folder: Path
    continues_requests: bool = False
    tokenizer: str = ""

    @classmethod
    def new(
        cls,
        settings: SGLangConfig,
        hf_config: PretrainedConfig,
        dtype: str,
        stop_token_ids: Sequence[int],
        folder: Path,
        continues_requests: bool = False,
        tokenizer: str = "",
    ) -> ServerPlan:
        """Return a plan with new random keys. Raise ConfigError if the dtype does not go with `quantize`."""
        keys = Keys(secrets.token_hex(32), secrets.token_hex(32))
        model = {**hf_config.to_dict(), "eos_token_id": list(stop_token_ids), "architectures": hf_config.architectures}
        if settings.quantize == "fp8":
            if dtype == "float32":
                raise ConfigError(
                    "rollout.sglang.quantize fp8 multiplies in bf16, but model.dtype is fp32; set model.dtype bf16"
                )
            model["quantization_config"] = quantization_config()
        return cls(settings, keys, model, dtype, folder.absolute(), continues_requests, tokenizer)

    def write_keys(self) -> None:
        """Write keys.json, for people who want to call the servers themselves."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"api_key": self.keys.api, "admin_key": self.keys.admin}
        write_private(self.folder / "keys.json", json.dumps(content))

    def build(self, number: int, host: str, port: socket.socket, first_gpu: int, sglang: Installed) -> ServerProcess:
        """Return server `number` on a reserved port, with its files written, not yet started.

        Raise ConfigError for a value in `server_args` that its option cannot take.
        """
        number_of_port = port.getsockname()[1]
        arguments = command_line(_options(self, host, number_of_port, first_gpu), sglang.options)
        _write_model(self.model, self.tokenizer, self.folder / "model")
        write_private(self.folder / f"server-{number}.args", "\n".join([*arguments, ""]))
        keys = self.folder / f"server-{number}.yaml"
        write_private(keys, yaml.safe_dump({"api-key": self.keys.api, "admin-api-key": self.keys.admin}))
        command = [python_of(self.settings), "-P", "-m", "sglang.launch_server", *arguments, "--config", str(keys)]
        environment = server_environment(self.settings, sglang.models, self.model["model_type"])
        url = f"http://{f'[{host}]' if ':' in host else host}:{number_of_port}"
        return ServerProcess(command, environment, self.folder, f"server-{number}", url, port)


def start_servers(plan: ServerPlan) -> list[ServerProcess]:
    """Start the plan's servers as children of this process. They hold random weights until the first update.

    Raise ConfigError if SGLang is missing or too old, lacks an option, too few GPUs are there, or a port is taken.
    """
    settings = plan.settings
    sglang = inspect_environment(settings, plan.continues_requests)
    first = settings.first_gpu or 0
    check_devices(settings, settings.num_servers, first)
    ports = [reserve_port(settings, settings.host, number) for number in range(settings.num_servers)]
    plan.write_keys()
    gpus = range(first, first + settings.num_servers * settings.tensor_parallel, settings.tensor_parallel)
    servers = [plan.build(i, settings.host, port, gpu, sglang) for i, (port, gpu) in enumerate(zip(ports, gpus))]
    for server in servers:
        server.start()
    return servers


def read_keys(path: str | None) -> Keys:
    """Return the keys in a JSON file {"api_key": …, "admin_key": …}, or no keys without a path.

    Raise ConfigError if others can read the file, or it cannot be read.
    """
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


def quantization_config() -> dict[str, Any]:
    """Return `quantization_config` of a config.json for FP8: SGLang then keeps projections in FP8, everything else as it is.

    The server quantises activations itself, with one scale for each token and 128 channels.
    """
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
    }


def _options(plan: ServerPlan, host: str, port: int, first_gpu: int) -> dict[str, Any]:
    """Return the server's options except the keys. The first update brings its weights, and tokens need no tokenizer."""
    settings = plan.settings
    ours = {
        "model-path": str(plan.folder / "model"),
        "load-format": "dummy",
        "skip-tokenizer-init": not plan.tokenizer,
        "dtype": plan.dtype,
        "device": settings.device,
        "tp-size": settings.tensor_parallel,
        "host": host,
        "port": port,
        "log-level": "warning",
    }
    # on a CPU base-gpu-id would name a NUMA node, and there is no memory saver
    on_gpu = {"base-gpu-id": first_gpu, "enable-memory-saver": settings.colocated}
    if settings.delta:
        ours["custom-weight-loader"] = [DELTA_LOADER]
    return ours | (CPU_ARGS if settings.device == "cpu" else on_gpu) | settings.server_args


def server_environment(settings: SGLangConfig, models: Sequence[str], model_type: str) -> dict[str, str]:
    """Return a server's environment variables: ours, without those that only a rank or a worker of the run may have.

    models      names of SGLang's model modules. A server on a CPU imports only the one of `model_type`.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _NOT_INHERITED and not name.startswith(_NOT_INHERITED_PREFIXES)
    }
    kept["HF_HUB_OFFLINE"] = "1"
    if settings.delta:
        kept["PYTHONPATH"] = str(Path(server_side.__file__).absolute().parent)
    if settings.device == "cpu":
        kept["SGLANG_USE_CPU_ENGINE"] = "1"
        kept["OMP_NUM_THREADS"] = "1"  # more is many times slower for a model small enough for a CPU
        # importing all of them takes most of a small server's start, and CUDA packages
        kept["SGLANG_DISABLED_MODEL_ARCHS"] = ",".join(name for name in models if name != model_type)
    return kept


def check_devices(settings: SGLangConfig, num_servers: int, first_gpu: int = 0) -> None:
    """Raise ConfigError if this machine has too few GPUs for `num_servers` servers from `first_gpu` on."""
    if settings.device == "cpu":
        return
    import torch  # not above: a Ray actor on a CPU starts in half the time without it

    needed, found = num_servers * settings.tensor_parallel, torch.cuda.device_count()
    if not found:
        raise ConfigError(
            "rollout.sglang.device is cuda, but this machine has no CUDA device; set rollout.sglang.device cpu, or name "
            "servers on other machines in rollout.sglang.urls"
        )
    if first_gpu + needed > found:
        raise ConfigError(
            f"rollout.sglang.num_servers {num_servers} × tensor_parallel {settings.tensor_parallel} = {needed} GPUs after "
            f"the first {first_gpu} of this machine, which has {found}; lower either, start fewer trainer processes here, "
            "or share GPUs (rollout.sglang.colocated true)"
        )


def check_shared_gpus(settings: SGLangConfig, num_ranks: int) -> None:
    """Raise ConfigError if servers share the GPUs of `num_ranks` trainer processes, one each, but need more."""
    needed = settings.num_gpus
    if settings.colocated and settings.device == "cuda" and needed > num_ranks:
        raise ConfigError(
            f"rollout.sglang.num_servers {settings.num_servers} × tensor_parallel {settings.tensor_parallel} = {needed} GPUs, but "
            f"the trainer has {num_ranks} to share (rollout.sglang.colocated); lower either, or start more processes"
        )


def check_node_gpus(settings: SGLangConfig, per_node: int) -> None:
    """Raise ConfigError if nodes of `per_node` GPUs cannot hold the servers where rollout.sglang.placement starts them."""
    needed = settings.num_gpus
    if settings.device == "cpu" or settings.urls:
        return
    if settings.tensor_parallel > per_node:
        raise ConfigError(
            f"rollout.sglang.tensor_parallel {settings.tensor_parallel}: a server is on one node, which has {per_node} GPUs; set it "
            f"at most {per_node}"
        )
    if settings.placement == "local" and needed > per_node:
        raise ConfigError(
            f"rollout.sglang.num_servers {settings.num_servers} × tensor_parallel {settings.tensor_parallel} = {needed} GPUs, but "
            f"placement local starts all servers on rank 0's node, which has {per_node}; set placement nodes and host node"
        )


def check_heads(settings: SGLangConfig, num_heads: int) -> None:
    """Raise ConfigError if SGLang cannot divide the model's attention heads over the GPUs of a server."""
    size = settings.tensor_parallel
    if num_heads % size and not settings.urls:
        fitting = [number for number in range(1, size) if num_heads % number == 0]
        raise ConfigError(
            f"rollout.sglang.tensor_parallel {size} does not divide the model's {num_heads} attention heads; set it "
            f"{fitting[-1]}, or another divisor"
        )


def reserve_port(settings: SGLangConfig, host: str, number: int) -> socket.socket:
    """Bind the port of server `number` on this machine, base_port + number or a free one. It is ours until it is closed.

    A server takes half a minute to listen. Meanwhile the kernel may give a free port to any connection of any process. It
    does not give away a bound one, and with SO_REUSEADDR here and there the server can still listen on it.
    Raise ConfigError if another process listens there.
    """
    wanted = settings.base_port + number if settings.base_port else 0
    port = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        port.bind((host, wanted))
        return port
    except (OSError, OverflowError) as error:
        port.close()
        raise ConfigError(
            f"a server cannot listen on rollout.sglang.host {host} port {wanted}: {error}; choose another "
            "base_port, or leave it null for a free one"
        ) from error


def _write_model(config: dict[str, Any], tokenizer: str, folder: Path) -> None:
    """Write config.json, and a tokenizer if there is one. Without generation_config.json the server has no sampling defaults of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if tokenizer:
        (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
        named = {"tokenizer_class": "PreTrainedTokenizerFast"}  # every version of transformers has this class
        (folder / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")


def write_private(path: Path, text: str) -> None:
    """Write a new file that only this user can read."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
