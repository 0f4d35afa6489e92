"""A configuration against one node: its memory, disks, files, ports and GPUs. Each node of a job asks for itself.

Change here: what a run needs of each of its nodes. run.py checks what is the same for all of them.
"""

from __future__ import annotations

import os
import resource
import shutil
from dataclasses import dataclass
from pathlib import Path

from dapo_mcore.config.schema import Config
from dapo_mcore.config.sglang import SGLangConfig
from dapo_mcore.doctor.finding import Finding, State, hint, ok, outcome, refusal, wrong
from dapo_mcore.errors import ConfigError, DapoError

_GIB, _MIB = 2**30, 2**20
_PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


@dataclass(frozen=True)
class Here:
    """What this node has for the run.

    num_gpus     GPUs that torch sees; gpu: the name of the first, "" without one
    has_engine   True if Transformer Engine can be imported; has_ray: True if Ray is installed
    has_sglang   False if servers start here, but SGLang is missing or not supported
    processes    of the whole job, None if no launcher says; local_ranks: of them on this node
    node         the node's number in the job; rank 0 runs on node 0
    memory       bytes that processes here may use together: what is available, within the cgroup's limit
    """

    num_gpus: int
    has_engine: bool
    has_ray: bool
    processes: int | None
    local_ranks: int
    node: int = 0
    gpu: str = ""
    memory: int = 2**62
    has_sglang: bool = True

    @property
    def num_nodes(self) -> int | None:
        return max(self.processes // self.local_ranks, 1) if self.processes else None

    def servers(self, settings: SGLangConfig) -> range:
        """Return the numbers of the servers that start here: in turn on all nodes (placement nodes), or all beside rank 0."""
        if settings.urls or settings.placement == "ray" or (settings.placement == "local" and self.node != 0):
            return range(0)
        if settings.placement == "local":
            return range(settings.num_servers)
        return range(self.node, settings.num_servers, self.num_nodes or settings.num_servers)


def check_node(config: Config, here: Here) -> list[Finding]:
    """Return whether this node has what the run needs of it. Imports torch and transformers, reads the model's config.json."""
    try:
        values = count_values(config)
    except DapoError as error:
        # on node 0 the run's own check says it, see run.check_start
        return [refusal("model", error)] if here.node else []
    output = check_folder("output_dir", config.run_dir, made=2)
    if not any(found.state is State.WRONG for found in output):
        output.append(check_checkpoint_space(config, values, free_space(config.run_dir)))
    findings = [*output, *check_host_memory(config, here)]
    return findings + (check_servers(config, here, values) if config.rollout.engine == "sglang" else [])


def count_values(config: Config) -> int:
    """Return the number of the model's parameters. A tied output layer counts once."""
    from dapo_mcore.architecture.shape import weight_shape
    from dapo_mcore.model_files.hf_config import load_hf_config
    from dapo_mcore.plan.parameters import whole_model

    return whole_model(weight_shape(load_hf_config(config.model), tensor_parallel=1))


def checkpoint_bytes(config: Config, values: int) -> int:
    """Return the bytes of the tensors in one checkpoint of a model with so many parameters."""
    from dapo_mcore.plan.held import stored_bytes, stored_critic_bytes

    return values * (
        stored_bytes(config) + stored_critic_bytes(config)
    )  # a critic lacks no more than the output matrix


def check_checkpoint_space(config: Config, values: int, free: int) -> Finding:
    """Return whether the run's folder has room for its checkpoints: a new one is whole before an old one goes."""
    plan, folder = config.checkpoint, config.run_dir
    if plan.every is None and not plan.at_end:
        return ok("checkpoint space", "nothing is saved (checkpoint.every null, at_end false)")
    one = checkpoint_bytes(config, values)
    saves = 1
    if plan.every:
        saves += (plan.keep or 1) if config.num_rollout_steps is None else config.num_rollout_steps // plan.every
    stored = [path for path in folder.glob("checkpoints/step_*") if path.suffix == ""]
    in_all = saves + len(stored)
    copies = max((in_all if plan.keep is None else min(plan.keep + 1, in_all)) - len(stored), 1)
    exported = values * _weight_bytes(config) if plan.export_every or plan.export_at_end else 0
    needed = copies * one + exported
    shown = f"{copies} more of {size_of(one)}{f' and an export of {size_of(exported)}' if exported else ''}"
    if free < needed:
        return wrong(
            "checkpoint space",
            f"{folder} has {size_of(free)} free, but {shown} need {size_of(needed)}",
            f"make room, choose another output_dir, or {'lower' if plan.keep else 'set'} checkpoint.keep",
        )
    return ok("checkpoint space", f"{size_of(free)} free in {folder} for {shown}")


def check_folder(key: str, folder: Path, made: int = 1) -> list[Finding]:
    """Return whether the folder can be made, or written into.

    made  how many of its last parts a first run makes; where more are missing, a file system may not be mounted
    """
    place = _existing(folder)
    if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
        missing = len(folder.absolute().parts) - len(place.parts)
        return [_far_from(place, key, folder)] if missing > made else []
    what = "cannot be written" if place.is_dir() else "is a file"
    return [wrong(key, f"{place} {what}", f"choose another {key}, or give yourself the right to write there")]


def _far_from(place: Path, key: str, folder: Path) -> Finding:
    return hint(
        key,
        f"{folder} does not exist; it would be made in {place} ({size_of(free_space(place))} free)",
        "mount its file system, or correct the path, unless this is meant",
    )


def identity(folder: Path) -> str:
    """Return what the file system says of the folder, or of the one that it will be made in: nodes that share it say the same.

    Return "" for a folder that cannot be opened.
    """
    place = _existing(folder)
    try:
        opened = os.open(place, os.O_RDONLY)  # on NFS an opened folder is not from a cache
    except OSError:
        return ""
    try:
        status = os.fstat(opened)
    finally:
        os.close(opened)
    return f"{place} {status.st_ino} {status.st_mtime_ns}"


def check_host_memory(config: Config, here: Here) -> list[Finding]:
    """Return whether the node has the host memory that `dapo-mcore plan` predicts. Nothing is predicted without a GPU it knows."""
    parts = host_parts(config, here)
    if not parts:
        return []
    name, needed, largest = "host memory", sum(parts.values()), max(parts, key=lambda part: parts[part])
    detail = f"the run needs about {size_of(needed)} (dapo-mcore plan), {size_of(parts[largest])} of it for {largest}"
    if needed > here.memory:
        return [
            hint(
                name,
                f"{detail}, but processes here may use {size_of(here.memory)}: the kernel kills what uses more",
                "ask for more (sbatch --mem=0 takes all, docker --memory); dapo-mcore plan says which keys need less",
            )
        ]
    return [ok(name, f"{detail}, and may use {size_of(here.memory)}")]


def host_parts(config: Config, here: Here) -> dict[str, float]:
    """Return the bytes of host memory that a plan predicts for this node, by what they are for; empty without a plan."""
    from dapo_mcore.model_files.hf_config import load_hf_config
    from dapo_mcore.plan.batch import batch_of
    from dapo_mcore.plan.hardware import GPUS, Assumptions
    from dapo_mcore.plan.host import host_memory
    from dapo_mcore.plan.job import Cluster, make_job

    kind = next((kind for kind in GPUS if kind.upper() in here.gpu.upper()), None)
    if kind is None:
        return {}
    cluster = Cluster(GPUS[kind], here.num_gpus, here.num_nodes or 0)
    try:
        job = make_job(config, load_hf_config(config.model), cluster, Assumptions())
        parts = host_memory(job, batch_of(job)).parts
    except ConfigError:  # the run's own check says it, or plan does not read a key
        return {}
    # rank 0 alone keeps rollouts
    return {name: value for name, value in parts.items() if here.node == 0 or name != "rollouts"}


def check_servers(config: Config, here: Here, values: int) -> list[Finding]:
    """Return whether this node can start its servers, hold their weights, and on node 0 keep a connection per request."""
    settings = config.rollout.sglang
    servers = here.servers(settings)
    connections = settings.num_servers if here.node == 0 else min(len(servers), 1)
    findings = check_sync_space(config, values) if servers or here.node == 0 else []
    if connections:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        findings.insert(0, check_connections(settings, connections, *limits))
    if servers:
        findings += [check_server_gpus(settings, here), *check_ports(settings, here)]
    return findings


def check_connections(settings: SGLangConfig, num_servers: int, soft: int, hard: int) -> Finding:
    """Return whether a process here may open a connection per request of so many servers: rank 0 has those of all, a server its own.

    soft, hard  limits of open files
    """
    from dapo_mcore.rollout.sglang.client.http import open_file_limit

    connections = num_servers * settings.connections_per_server
    detail = f"open files are enough for {num_servers} × rollout.sglang.max_in_flight {settings.max_in_flight}"
    return outcome("connections", detail, lambda: open_file_limit(connections, soft, hard))


def check_sync_space(config: Config, values: int) -> list[Finding]:
    """Return whether rollout.sglang.sync_dir holds two versions of the model, or /dev/shm two buckets."""
    settings = config.rollout.sglang
    if settings.sync == "disk":
        needed, folder = 2 * values * _weight_bytes(config), Path(settings.sync_dir)
        remedy = "choose a larger sync_dir, or sync distributed"
        what = f"two versions of the model need {size_of(needed)}"
    elif settings.sync == "tensor" and settings.device == "cpu":
        needed, folder = 2 * settings.bucket_mib * _MIB, Path("/dev/shm")
        remedy = "docker run --shm-size, lower rollout.sglang.bucket_mib, or sync distributed"
        what = f"two buckets need {size_of(needed)}"
    else:
        return []
    free = free_space(folder)
    if free < needed:
        return [wrong("sync space", f"{folder} has {size_of(free)} free, but {what}", remedy)]
    found = check_folder("rollout.sglang.sync_dir", folder)
    return found or [ok("sync space", f"{size_of(free)} free in {folder}; {what}")]


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
            "lower num_servers or tensor_parallel, start fewer processes here (in a Slurm job RANKS_PER_NODE below GPUS_PER_NODE), "
            "or set rollout.sglang.colocated true",
        )
    return ok(name, f"{first} to {first + needed - 1} of {here.num_gpus}")


def check_ports(settings: SGLangConfig, here: Here, local_ports: str | None = None) -> list[Finding]:
    """Return whether the servers' ports are free now, and outside the range from which the kernel gives ports to clients.

    local_ports  that range as text: `32768 60999`; by default this machine's
    """
    from dapo_mcore.rollout.sglang.launch.servers import reserve_port

    if settings.base_port is None:
        return [ok("ports", "any free ones (rollout.sglang.base_port null)")]
    numbers, host = here.servers(settings), "0.0.0.0" if settings.host == "node" else settings.host
    first, last = (settings.base_port + number for number in (numbers[0], numbers[-1]))

    def try_all() -> None:
        for number in numbers:
            reserve_port(settings, host, number).close()

    shown = f"{first} to {last}" if first != last else f"{first}"
    findings = [outcome("ports", f"{shown} free now", try_all)]
    low, high = map(int, (local_ports or _PORT_RANGE.read_text(encoding="utf-8")).split())
    if low <= last and first <= high:
        detail = f"{shown}: the kernel gives ports of {low} to {high} to any client, perhaps before the servers start"
        findings.append(hint("ports", detail, f"choose a base_port below {low - settings.num_servers}, or null"))
    return findings


def free_space(folder: Path) -> int:
    """Return the free bytes where the folder is, or will be."""
    return shutil.disk_usage(_existing(folder)).free


def _existing(folder: Path) -> Path:
    absolute = folder.absolute()
    return next(path for path in (absolute, *absolute.parents) if path.exists())


def _weight_bytes(config: Config) -> int:
    return 2 if config.model.dtype == "bf16" else 4


def size_of(num_bytes: float) -> str:
    """Return the bytes with a unit that fits: `1.5 GiB`, `820 MiB`."""
    return f"{num_bytes / _GIB:,.1f} GiB" if num_bytes >= _GIB else f"{num_bytes / _MIB:,.1f} MiB"
