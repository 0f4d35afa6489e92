"""GPUs and NVIDIA's libraries beside them: which GPUs torch sees, which cuDNN is loaded, which NCCL.

Change here: what is said of a GPU, and where a second cuDNN can hide.
"""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapo_mcore.doctor.finding import Finding, fallback, hint, ok, wrong
from dapo_mcore.doctor.installed import Import, Installed

_GIB = 2**30
_FREE = 0.9
_FIRST_WITH_BF16, _FIRST_WITH_FP8 = [8, 0], [8, 9]
_PRELOAD = (
    "nv=$(python -c 'import nvidia; print(nvidia.__path__[0])'); export LD_LIBRARY_PATH=$nv/cudnn/lib "
    "LD_PRELOAD=$(ls $nv/cudnn/lib/libcudnn*.so.9 | paste -sd:)"
)


def check_gpus(torch: Import, device_files: Sequence[str], visible: str | None) -> list[Finding]:
    """Return a finding per kind of GPU, and one per GPU that others use.

    device_files  the driver's files, `/dev/nvidia0` …; visible: CUDA_VISIBLE_DEVICES, None if it is not set
    """
    gpus = torch.facts.get("gpus") or []
    if not gpus:
        return [_no_gpu(torch, device_files, visible)]
    kinds = Counter((gpu["name"], gpu["total_bytes"] // _GIB, tuple(gpu["capability"])) for gpu in gpus)
    findings = [_kind(count, *kind) for kind, count in kinds.items()]
    if len(kinds) > 1:
        names = ", ".join(sorted({name for name, *_ in kinds}))
        findings.append(
            hint(
                "GPUs",
                f"of {len(kinds)} kinds ({names}): all wait for the slowest",
                "choose alike ones by CUDA_VISIBLE_DEVICES",
            )
        )
    return findings + [
        _busy(number, gpu) for number, gpu in enumerate(gpus) if gpu["free_bytes"] < _FREE * gpu["total_bytes"]
    ]


def _no_gpu(torch: Import, device_files: Sequence[str], visible: str | None) -> Finding:
    if not device_files:
        return fallback("GPUs", "none: a run computes on CPUs, by the same code")
    here = f"{len(device_files)} are in this machine ({device_files[0]} …), but torch sees none, so a run would compute on CPUs"
    if visible in ("", "-1"):
        return hint("GPUs", f"{here}: CUDA_VISIBLE_DEVICES={visible!r} hides them", "unset CUDA_VISIBLE_DEVICES")
    if torch.facts and not torch.facts["cuda"]:
        return hint("GPUs", f"{here}: it is built for CPUs", "install torch for CUDA (https://pytorch.org)")
    built = f"torch is built for CUDA {torch.facts['cuda']}" if torch.facts else "torch cannot be imported"
    return hint(
        "GPUs",
        f"{here}: {built}",
        "compare with the CUDA version that nvidia-smi shows; a newer driver or an older torch",
    )


def _kind(count: int, name: str, gib: int, capability: tuple[int, int]) -> Finding:
    shown = f"{count} × {name}, {gib} GiB, compute capability {capability[0]}.{capability[1]}"
    if list(capability) < _FIRST_WITH_BF16:
        return hint(
            "GPUs", f"{shown}: bf16 is emulated, and slow", "use GPUs of compute capability 8.0 or later (A100, H100)"
        )
    if list(capability) < _FIRST_WITH_FP8:
        return ok("GPUs", f"{shown}; no FP8, which begins with 8.9")
    return ok("GPUs", shown)


def _busy(number: int, gpu: Mapping[str, Any]) -> Finding:
    return hint(
        "GPU memory",
        f"GPU {number} has {gpu['free_bytes'] / _GIB:.1f} of {gpu['total_bytes'] / _GIB:.1f} GiB free",
        "end what uses it (nvidia-smi names it), maybe left by an earlier job",
    )


def check_nccl(torch: Import) -> Finding:
    nccl = torch.facts.get("nccl")
    return ok("NCCL", nccl) if nccl else fallback("NCCL", "not in use: without a GPU, ranks talk by gloo")


@dataclass(frozen=True)
class Library:
    """A copy of a library: its folder, and its version as far as it is known ("" otherwise)."""

    folder: str
    version: str


@dataclass(frozen=True)
class Cudnn:
    """Copies of cuDNN on a machine.

    torchs    the one in the `nvidia` package that torch came with, None without it
    others    those that the loader or Transformer Engine may find instead
    loaded    folders of what a process has loaded that imports torch and Transformer Engine
    is_first  True if LD_PRELOAD or LD_LIBRARY_PATH names torch's before any other
    """

    torchs: Library | None
    others: tuple[Library, ...]
    loaded: tuple[str, ...]
    is_first: bool


def check_cudnn(cudnn: Cudnn, engine_in_use: bool) -> Finding:
    """Return whether one cuDNN alone is loaded. Two break fused attention with CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED."""
    name, torchs = "cuDNN", cudnn.torchs
    others = [other for other in cudnn.others if torchs is None or not _is_version(other.version, torchs.version)]
    harmless = {copy.folder for copy in cudnn.others} - {other.folder for other in others}
    loaded = [folder for folder in cudnn.loaded if folder not in harmless]
    if len(loaded) > 1:
        state = wrong if engine_in_use else hint
        return state(name, f"two are loaded at once, from {' and '.join(loaded)}: fused attention fails", _PRELOAD)
    beside = ", ".join(f"{other.version} in {other.folder}" for other in others)
    if torchs is None:
        return ok(name, beside) if others else fallback(name, "not in use: it comes with torch for CUDA")
    used = f"torch's {torchs.version}"
    if not others:
        return ok(name, used)
    if cudnn.is_first:
        return ok(name, f"{used}; LD_PRELOAD or LD_LIBRARY_PATH keeps off {beside}")
    if not engine_in_use:
        return ok(name, f"{used}; also {beside}")
    return hint(name, f"{used}, and {beside}: if Transformer Engine loads that one, its attention fails", _PRELOAD)


def _is_version(version: str, whole: str) -> bool:
    """Return True if `version` is the beginning of `whole` and names more than its first number."""
    return "." in version and f"{whole}.".startswith(f"{version}.")


def find_cudnn(
    installed: Installed, imports: Iterable[Import], environment: Mapping[str, str], loader_cache: str
) -> Cudnn:
    """Return the copies of cuDNN. `loader_cache` is what `ldconfig -p` prints."""
    names = ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12")
    version = next((found for name in names if (found := installed.version(name))), None)
    folder = Path(sysconfig.get_paths()["purelib"], "nvidia", "cudnn", "lib").resolve()
    searched = [place for name in ("LD_PRELOAD", "LD_LIBRARY_PATH") for place in _folders(environment.get(name))]
    homes = [Path(environment[name]) for name in ("CUDNN_HOME", "CUDNN_PATH") if environment.get(name)]
    places = searched + [home / part for home in homes for part in ("lib", "lib64")]
    places += [Path(found).parent for found in re.findall(r"libcudnn\.so\S* .*=> (\S+)", loader_cache)]
    others = {lib.folder: lib for place in places if (lib := _library(place)) and Path(lib.folder) != folder}
    return Cudnn(
        torchs=Library(str(folder), version) if version else None,
        others=tuple(others.values()),
        loaded=tuple(sorted({str(Path(file).resolve().parent) for found in imports for file in found.cudnn_files})),
        is_first=next((place for place in searched if _library(place) or place == folder), None) == folder,
    )


def _folders(paths: str | None) -> list[Path]:
    """Return the folders of a list of folders and libraries, as LD_LIBRARY_PATH and LD_PRELOAD have them."""
    found = [Path(path) for path in re.split("[: ]", paths or "") if path]
    return [(path.parent if ".so" in path.name else path).resolve() for path in found]


def _library(place: Path) -> Library | None:
    """Return the cuDNN in a folder. Its version is the end of the file that `libcudnn.so.9` links to."""
    files = sorted(place.glob("libcudnn.so*")) if place.is_dir() else []
    if not files:
        return None
    file = files[-1].resolve()
    return Library(str(file.parent), file.name.partition(".so.")[2])


def loader_cache() -> str:
    """Return what `ldconfig -p` prints; empty if it cannot be asked."""
    try:
        command = ["/sbin/ldconfig", "-p"]
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def device_files() -> list[str]:
    return sorted(str(path) for path in Path("/dev").glob("nvidia[0-9]*"))


def check_devices(installed: Installed, torch: Import, engine: Import | None) -> list[Finding]:
    """Return the findings about this machine's GPUs and the libraries that use them."""
    imports = [torch, *([engine] if engine else [])]
    cudnn = find_cudnn(installed, imports, os.environ, loader_cache())
    in_use = engine is not None and bool(torch.facts.get("gpus"))
    return [
        *check_gpus(torch, device_files(), os.environ.get("CUDA_VISIBLE_DEVICES")),
        check_cudnn(cudnn, in_use),
        check_nccl(torch),
    ]
