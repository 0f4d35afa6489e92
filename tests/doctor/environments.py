"""Environments and imports that tests hand to the checks in place of this machine's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dapo_mcore.doctor.installed import Import, Installed

GIB = 2**30


def environment(
    versions: Mapping[str, str] | None = None,
    modules: tuple[str, ...] = (),
    imports: Mapping[str, Import] | None = None,
) -> Installed:
    """Return an environment with these distributions and modules alone. Imports succeed unless `imports` says otherwise."""
    versions, imports = versions or {}, imports or {}
    return Installed(versions.get, modules.__contains__, lambda name: imports.get(name, Import()))


def gpu(
    name: str = "NVIDIA H100 80GB HBM3", free: float = 79.0, capability: tuple[int, int] = (9, 0)
) -> dict[str, Any]:
    """Return a GPU of 80 GiB as probe.py reports it."""
    return {"name": name, "total_bytes": 80 * GIB, "free_bytes": int(free * GIB), "capability": list(capability)}


def torch_with(*gpus: dict[str, Any], version: str = "2.11.0+cu130", cuda: str | None = "13.0") -> Import:
    nccl = "2.28.9" if gpus else None
    return Import(facts={"version": version, "cuda": cuda, "cudnn": 91900, "nccl": nccl, "gpus": list(gpus)})
