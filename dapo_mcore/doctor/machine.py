"""The machine and the limits that this process has on it: memory, files, CPUs, the clock, caches.

Change here: a limit that runs have met. Each check takes what the system says; check_machine asks the system.
"""

from __future__ import annotations

import ctypes
import getpass
import os
import resource
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from dapo_mcore.doctor.finding import Finding, hint, ok
from dapo_mcore.doctor.network import check_interfaces, check_proxies

_GIB = 2**30
_LITTLE_SHARED = _GIB
_FEW_FILES = 4096
_LONGEST_SOCKET, _RAYS_PART = 107, 68
"""Bytes of a socket's path that Linux allows, and those that Ray adds: /ray/session_…/sockets/plasma_store."""
_NETWORK = ("nfs", "nfs4", "lustre", "beegfs", "gpfs", "cifs", "ceph", "fuse.sshfs", "wekafs")
_UNSYNCHRONISED = 5
"""adjtimex returns TIME_ERROR if nothing keeps the clock in time."""


def check_memory(total: int, available: int, limit: int | None) -> Finding:
    """Return how much memory a run has. limit: bytes that the cgroup allows, None if it sets no limit."""
    shown = f"{available / _GIB:.1f} of {total / _GIB:.1f} GiB available"
    if limit is None or limit >= total:
        return ok("memory", shown)
    detail = f"{shown}, but the cgroup of this process may use {limit / _GIB:.1f} GiB"
    if limit < total // 2:
        return hint(
            "memory",
            detail,
            "ask for more (sbatch --mem=0 takes all, docker --memory): the kernel kills what uses more",
        )
    return ok("memory", detail)


def check_shared_memory(size: int, free: int) -> Finding:
    shown = f"{free / _GIB:.1f} of {size / _GIB:.1f} GiB free"
    if free < _LITTLE_SHARED:
        return hint(
            "/dev/shm",
            f"{shown}; NCCL, Ray and the sync of weights use it",
            "docker run --shm-size=16g, or mount a larger one",
        )
    return ok("/dev/shm", shown)


def check_open_files(soft: int, hard: int) -> Finding:
    if hard != resource.RLIM_INFINITY and hard < _FEW_FILES:
        return hint(
            "open files",
            f"at most {hard} (ulimit -Hn): few for servers and workers",
            f"ulimit -Hn {_FEW_FILES} or more",
        )
    return ok("open files", f"{_limit(soft)}, raised by a run up to {_limit(hard)}")


def check_locked_memory(hard: int, has_infiniband: bool) -> list[Finding]:
    if not has_infiniband or hard == resource.RLIM_INFINITY:
        return []
    return [
        hint(
            "locked memory",
            f"at most {hard // 1024} KiB (ulimit -l), but InfiniBand needs to lock what it sends",
            "ulimit -l unlimited, docker run --ulimit memlock=-1, or LimitMEMLOCK=infinity for slurmd",
        )
    ]


def check_cpus(allowed: int, total: int, local_ranks: int) -> Finding:
    shown = f"{allowed} of {total} for this process"
    if allowed < local_ranks:
        return hint(
            "CPUs",
            f"{shown}, and {local_ranks} ranks share them",
            "srun --cpus-per-task=N for the task that starts torchrun: srun does not inherit it from sbatch",
        )
    return ok("CPUs", shown)


def check_numa(nodes: int, balancing: bool) -> list[Finding]:
    """Return a hint if the kernel moves pages between several NUMA nodes, which stops GPUs' copies again and again."""
    if nodes < 2:
        return []
    if balancing:
        return [
            hint("NUMA", f"{nodes} nodes, and the kernel moves pages between them", "sysctl kernel.numa_balancing=0")
        ]
    return [ok("NUMA", f"{nodes} nodes; numactl or srun --cpu-bind=ldoms keeps a rank near its GPU")]


def check_clock(state: int | None) -> Finding:
    """Return whether the clock is kept in time. state: what adjtimex returns, None if it cannot be asked."""
    if state == _UNSYNCHRONISED:
        return hint("clock", "nothing keeps it in time", "start a time service (chrony, systemd-timesyncd)")
    return ok("clock", "kept in time" if state is not None else "cannot be asked here")


def check_temporary(folder: str) -> list[Finding]:
    """Return a hint if the sockets that Ray puts into the folder would have too long names."""
    size, most = len(os.fsencode(folder)), _LONGEST_SOCKET - _RAYS_PART
    if size <= most:
        return []
    detail = f"{folder} has {size} bytes; with more than {most} the sockets of Ray exceed {_LONGEST_SOCKET}"
    return [hint("TMPDIR", detail, "export TMPDIR=/tmp")]


def check_cache(variable: str, folder: Path, mounts: str) -> list[Finding]:
    """Return a hint if compiled kernels go to a network disk, where ranks of other nodes break them.

    variable  that names the folder; mounts: /proc/mounts
    """
    points = [line.split()[1:3] for line in mounts.splitlines()]
    inside = [(point, kind) for point, kind in points if folder.absolute().is_relative_to(point)]
    point, kind = max(inside, key=lambda found: len(found[0]), default=("", ""))
    if kind not in _NETWORK:
        return []
    detail = f"{folder} is on {kind} ({point}): nodes that share it break each other's kernels, or hang"
    return [hint("cache", detail, f"export {variable}=/tmp/{variable.lower()}-$USER-$SLURM_JOB_ID")]


def check_machine(hosts: Sequence[str], on_gpu: bool) -> list[Finding]:
    """Return the findings about this machine. hosts: addresses of it that calls within the run use."""
    import psutil

    memory, shared = psutil.virtual_memory(), Path("/dev/shm")
    usage = shutil.disk_usage(shared) if shared.is_dir() else None
    infiniband = Path("/sys/class/infiniband")
    return [
        check_memory(memory.total, memory.available, memory_limit()),
        *([check_shared_memory(usage.total, usage.free)] if usage else []),
        check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        *check_locked_memory(
            resource.getrlimit(resource.RLIMIT_MEMLOCK)[1], infiniband.is_dir() and any(infiniband.iterdir())
        ),
        check_cpus(len(os.sched_getaffinity(0)), os.cpu_count() or 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1))),
        *check_numa(
            len([*Path("/sys/devices/system/node").glob("node[0-9]*")]), _text("/proc/sys/kernel/numa_balancing") == "1"
        ),
        check_clock(_clock_state()),
        check_proxies(os.environ, hosts),
        *check_interfaces(os.environ, sorted(psutil.net_if_addrs()), on_gpu),
        *check_temporary(tempfile.gettempdir()),
        *(found for name, folder in caches(os.environ) for found in check_cache(name, folder, _text("/proc/mounts"))),
    ]


def caches(environment: Mapping[str, str]) -> list[tuple[str, Path]]:
    """Return the folders of compiled kernels, each with the variable that names another one."""
    inductor = Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
    return [
        ("TRITON_CACHE_DIR", Path(environment.get("TRITON_CACHE_DIR") or os.path.expanduser("~/.triton"))),
        ("TORCHINDUCTOR_CACHE_DIR", Path(environment.get("TORCHINDUCTOR_CACHE_DIR") or inductor)),
    ]


def usable_memory() -> int:
    """Return the bytes that this process and its children may use: what is available, within the cgroup's limit."""
    import psutil

    available = psutil.virtual_memory().available
    limit = memory_limit()
    return available if limit is None else min(available, limit)


def memory_limit() -> int | None:
    """Return the bytes that this process's cgroup may use, None if it sets no limit."""
    return cgroup_limit(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))


def cgroup_limit(membership: Path, root: Path) -> int | None:
    """Return the least memory limit of this process's cgroup and those around it, None if there is none.

    Reads version 1 and version 2. In a container the root stands for the container's own cgroup.
    """
    lines = [line.split(":", 2) for line in _text(membership).splitlines()]
    limits = []
    for _, controllers, path in lines:
        top, file = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        if controllers and "memory" not in controllers.split(","):
            continue
        folder = top / path.lstrip("/")
        around = [folder, *folder.parents]
        limits += [
            int(text) for place in around if place.is_relative_to(top) and (text := _text(place / file)).isdecimal()
        ]
    return min((limit for limit in limits if limit < 2**62), default=None)


def _text(path: str | Path) -> str:
    """Return a file's text without the space around it, or "" if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _clock_state() -> int | None:
    """Return what adjtimex says without setting anything, None if it fails."""
    buffer = ctypes.create_string_buffer(1024)  # struct timex has 208 bytes; its first field, modes, is 0
    state = ctypes.CDLL(None, use_errno=True).adjtimex(buffer)
    return state if state >= 0 else None


def _limit(number: int) -> str:
    return "any number" if number == resource.RLIM_INFINITY else f"{number:,}"
