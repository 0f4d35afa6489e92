"""A configuration against this machine: whether its run can start here, and has room, ports and files to go on.

Change here: what a run needs of a machine. Rules that a run checks itself are called (preflight.py), not repeated.
"""

from __future__ import annotations

import os
import resource
import shutil
import socket
import stat
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from urllib.parse import urlsplit

from dapo_mcore.config.schema import Config
from dapo_mcore.config.sglang import SGLangConfig
from dapo_mcore.doctor.finding import Finding, State, hint, ok, wrong
from dapo_mcore.errors import DapoError

_GIB, _MIB = 2**30, 2**20
_CONNECT_S = 3.0
_PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


@dataclass(frozen=True)
class Here:
    """What this machine has for the run.

    num_gpus     GPUs that torch sees
    has_engine   True if Transformer Engine can be imported; has_ray: True if Ray is installed
    processes    of the whole job, None if no launcher says; local_ranks: of them on this machine
    """

    num_gpus: int
    has_engine: bool
    has_ray: bool
    processes: int | None
    local_ranks: int

    def servers(self, settings: SGLangConfig) -> range:
        """Return the numbers of the servers that start here. On the nodes of a job they start in turn, here the first."""
        if settings.placement != "nodes":
            return range(settings.num_servers)
        nodes = self.processes // self.local_ranks if self.processes else settings.num_servers
        return range(0, settings.num_servers, max(nodes, 1))


def check_config(config: Config, here: Here) -> list[Finding]:
    """Return whether the run can start and go on here. Imports torch and transformers, reads rows but no weights."""
    findings = [*check_start(config, here.processes), *check_extensions(config, here)]
    if findings[0].state is State.WRONG:
        return findings  # the model's sizes may be what is missing
    values = count_values(config)
    findings += [
        check_checkpoint_space(config, values, free_space(config.run_dir)),
        *check_private_files(config.run_dir),
    ]
    if config.rollout.engine == "sglang":
        findings += check_servers(config, here, values)
    return findings


def check_start(config: Config, processes: int | None) -> list[Finding]:
    """Return whether a run of this configuration would start, or the first error of each part with which it would end."""
    from dapo_mcore.preflight import check_contents, check_run

    start = _outcome("start", "files, model and parallel layout fit", lambda: check_run(config, processes))
    if start.state is State.WRONG:
        return [start]  # the rest reads these files
    return [start, _outcome("data", "rows, weights, reward and servers' options fit", lambda: check_contents(config))]


def check_extensions(config: Config, here: Here) -> list[Finding]:
    """Return the keys that need Ray, or Transformer Engine on a GPU, if there is none."""
    engine = here.has_engine and here.num_gpus > 0
    servers = config.rollout.engine == "sglang" and config.rollout.sglang.placement == "ray"
    extra = "pip install 'dapo_mcore[te]' on a machine with a GPU, or "
    needs = [
        (
            config.model.transformer_impl == "transformer_engine",
            "model.transformer_impl transformer_engine",
            "set it auto",
        ),
        (
            config.optimizer.saves_memory,
            "optimizer state on the host or in bf16",
            "set offload_fraction 0, exp_avg_dtype fp32 and exp_avg_sq_dtype fp32",
        ),
        (config.model.fp8 is not None and here.num_gpus > 0, "model.fp8 on a GPU", "set model.fp8 null"),
    ]
    missing = [
        wrong("Transformer Engine", f"{what} needs it, but it is not in use", extra + remedy)
        for asked, what, remedy in needs
        if asked and not engine
    ]
    if (servers or config.reward.placement == "ray") and not here.has_ray:
        missing.append(wrong("Ray", "placement ray needs it, but it is not installed", "pip install 'dapo_mcore[ray]'"))
    return missing


def count_values(config: Config) -> int:
    """Return the number of the model's parameters. A tied output layer counts once."""
    from dapo_mcore.architecture.mapping import hf_shapes, parameters
    from dapo_mcore.architecture.shape import weight_shape
    from dapo_mcore.model_files.hf_config import load_hf_config

    shape = weight_shape(load_hf_config(config.model), tensor_parallel=1)
    return sum(prod(sizes) for found in parameters(shape) for sizes in hf_shapes(found, shape))


def checkpoint_bytes(config: Config, values: int) -> int:
    """Return the bytes of one checkpoint: weights, fp32 copies of bf16 weights, two moments, and a reference policy."""
    weight = _weight_bytes(config)
    optimizer = config.optimizer
    moments = sum(2 if dtype == "bf16" else 4 for dtype in (optimizer.exp_avg_dtype, optimizer.exp_avg_sq_dtype))
    copy = 4 if config.model.dtype == "bf16" else 0
    reference = weight if config.algo.kl.coef > 0 else 0
    return values * (weight + copy + moments + reference)


def check_checkpoint_space(config: Config, values: int, free: int) -> Finding:
    """Return whether the run's folder has room for its checkpoints: a new one is whole before an old one goes."""
    plan, folder = config.checkpoint, config.run_dir
    if plan.every is None and not plan.at_end:
        return ok("checkpoint space", "nothing is saved (checkpoint.every null, at_end false)")
    one = checkpoint_bytes(config, values)
    saves = config.num_rollout_steps // plan.every + 1 if plan.every else 1
    stored = [path for path in folder.glob("checkpoints/step_*") if path.suffix == ""]
    copies = max(min(plan.keep + 1, saves + len(stored)) - len(stored), 1)
    exported = values * _weight_bytes(config) if plan.export_every or plan.export_at_end else 0
    needed = copies * one + exported
    shown = f"{copies} more of {_size(one)}{f' and an export of {_size(exported)}' if exported else ''}"
    if free < needed:
        return wrong(
            "checkpoint space",
            f"{folder} has {_size(free)} free, but {shown} need {_size(needed)}",
            "make room, choose another output_dir, or lower checkpoint.keep",
        )
    return ok("checkpoint space", f"{_size(free)} free in {folder} for {shown}")


def check_folder(key: str, folder: Path) -> list[Finding]:
    """Return whether the folder can be made, or written into."""
    place = _existing(folder)
    if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
        return []
    what = "cannot be written" if place.is_dir() else "is a file"
    return [wrong(key, f"{place} {what}", f"choose another {key}, or give yourself the right to write there")]


def check_private_files(run_dir: Path) -> list[Finding]:
    """Return a hint for each file with servers' keys that others can read."""
    files = [path for pattern in ("keys.json", "server-*.yaml") for path in sorted(run_dir.glob(f"servers/{pattern}"))]
    open_to_others = [path for path in files if stat.S_IMODE(path.stat().st_mode) & 0o077]
    return [
        hint(
            "key files",
            f"{path} has mode {stat.S_IMODE(path.stat().st_mode):04o}: others can read it",
            f"chmod 600 {path}",
        )
        for path in open_to_others
    ]


def check_servers(config: Config, here: Here, values: int) -> list[Finding]:
    """Return whether SGLang servers can start or be reached, and get their weights."""
    from dapo_mcore.doctor.machine import check_proxies

    settings = config.rollout.sglang
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    findings = [check_open_files(settings, *limits), *check_sync_space(config, values)]
    hosts = [urlsplit(url).hostname or "" for url in settings.urls] or [settings.host]
    proxies = check_proxies(os.environ, [host for host in dict.fromkeys(hosts) if host not in ("127.0.0.1", "node")])
    if proxies.remedy:
        findings.append(proxies)
    if settings.urls:
        return findings + [check_url(url) for url in settings.urls]
    if settings.placement != "ray":
        findings += [check_server_gpus(settings, here), *check_ports(settings, here)]
    return findings


def check_open_files(settings: SGLangConfig, soft: int, hard: int) -> Finding:
    """Return whether this process may open a connection per request. soft, hard: its limits of open files."""
    from dapo_mcore.rollout.sglang.client.http import open_file_limit

    connections = settings.num_servers * (settings.max_in_flight + 8)
    detail = f"enough for {settings.num_servers} × rollout.sglang.max_in_flight {settings.max_in_flight}"
    return _outcome("open files", detail, lambda: open_file_limit(connections, soft, hard))


def check_sync_space(config: Config, values: int) -> list[Finding]:
    """Return whether rollout.sglang.sync_dir holds two versions of the model, or /dev/shm two buckets."""
    settings = config.rollout.sglang
    if settings.sync == "disk":
        needed, folder = 2 * values * _weight_bytes(config), Path(settings.sync_dir)
        remedy = "choose a larger sync_dir, or sync distributed"
        what = f"two versions of the model need {_size(needed)}"
    elif settings.sync == "tensor" and settings.device == "cpu":
        needed, folder = 2 * settings.bucket_mib * _MIB, Path("/dev/shm")
        remedy = "docker run --shm-size, lower rollout.sglang.bucket_mib, or sync distributed"
        what = f"two buckets need {_size(needed)}"
    else:
        return []
    free = free_space(folder)
    if free < needed:
        return [wrong("sync space", f"{folder} has {_size(free)} free, but {what}", remedy)]
    return [
        *check_folder("rollout.sglang.sync_dir", folder),
        ok("sync space", f"{_size(free)} free in {folder}; {what}"),
    ]


def check_server_gpus(settings: SGLangConfig, here: Here) -> Finding:
    """Return whether this machine has GPUs for its servers beside those of the trainer's ranks."""
    name, count = "servers' GPUs", len(here.servers(settings))
    needed = count * settings.tensor_parallel
    if settings.device == "cpu":
        return ok(name, "not needed: rollout.sglang.device cpu")
    first = settings.first_gpu if settings.first_gpu is not None else 0 if settings.colocated else here.local_ranks
    if not here.num_gpus:
        return wrong(
            name,
            "rollout.sglang.device is cuda, but there is no GPU",
            "set it cpu, or name servers in rollout.sglang.urls",
        )
    if first + needed > here.num_gpus:
        return wrong(
            name,
            f"{count} servers × rollout.sglang.tensor_parallel {settings.tensor_parallel} after the first {first} of "
            f"{here.num_gpus} GPUs",
            "lower num_servers or tensor_parallel, start fewer processes here, or set rollout.sglang.colocated true",
        )
    return ok(name, f"{first} to {first + needed - 1} of {here.num_gpus}")


def check_ports(settings: SGLangConfig, here: Here, local_ports: str | None = None) -> list[Finding]:
    """Return whether the servers' ports are free now, and outside the range from which the kernel gives ports to clients.

    local_ports  that range as text: `32768 60999`; by default this machine's
    """
    from dapo_mcore.rollout.sglang.launch.servers import reserve_port

    if settings.base_port is None:
        return [ok("ports", "any free ones (rollout.sglang.base_port null)")]
    numbers, host = here.servers(settings), "" if settings.host == "node" else settings.host
    first, last = (settings.base_port + number for number in (numbers[0], numbers[-1]))

    def try_all() -> None:
        for number in numbers:
            reserve_port(settings, host, number).close()

    findings = [_outcome("ports", f"{first} to {last} are free", try_all)]
    low, high = map(int, (local_ports or _PORT_RANGE.read_text(encoding="utf-8")).split())
    if low <= last and first <= high:
        detail = f"{first} to {last} are among those that the kernel gives to any client ({low} to {high})"
        findings.append(hint("ports", detail, f"choose a base_port below {low - settings.num_servers}, or null"))
    return findings


def check_url(url: str) -> Finding:
    """Return whether something listens at a server's address. Sends nothing, and uses no proxy."""
    parts = urlsplit(url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), timeout=_CONNECT_S).close()
    except (OSError, ValueError) as error:  # ValueError: no such port
        return wrong("servers", f"{url} cannot be reached: {error}", "start the server, or correct rollout.sglang.urls")
    return ok("servers", f"{url} listens")


def free_space(folder: Path) -> int:
    """Return the free bytes where the folder is, or will be."""
    return shutil.disk_usage(_existing(folder)).free


def _existing(folder: Path) -> Path:
    absolute = folder.absolute()
    return next(path for path in (absolute, *absolute.parents) if path.exists())


def _outcome(name: str, detail: str, action: Callable[[], object]) -> Finding:
    """Return `detail` if the action succeeds, else its error. Its last clause is the remedy, as everywhere in this project."""
    try:
        action()
    except ImportError as error:
        return wrong(name, str(error), "pip install dapo_mcore again, with its dependencies")
    except DapoError as error:
        what, _, remedy = str(error).rpartition("; ")
        return wrong(name, what or remedy, remedy if what else "")
    return ok(name, detail)


def _weight_bytes(config: Config) -> int:
    return 2 if config.model.dtype == "bf16" else 4


def _size(num_bytes: float) -> str:
    """Return the bytes with a unit that fits: `1.5 GiB`, `820 MiB`."""
    return f"{num_bytes / _GIB:,.1f} GiB" if num_bytes >= _GIB else f"{num_bytes / _MIB:,.1f} MiB"
