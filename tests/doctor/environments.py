"""Environments, imports, ranks and nodes that tests hand to the checks in place of this machine's, and a small configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dapo_mcore.config.file import load_config
from dapo_mcore.config.schema import Config
from dapo_mcore.doctor.installed import Import, Installed
from dapo_mcore.doctor.needs import Here
from dapo_mcore.doctor.rank import Rank

GIB = 2**30
CPU = Here(num_gpus=0, has_engine=False, has_ray=False, processes=None, local_ranks=1)
NODE = Here(num_gpus=8, has_engine=True, has_ray=True, processes=32, local_ranks=8)
ALIKE = {"torch": "2.11.0", "megatron-core": "0.16.1"}


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


def job(nodes: int = 3, per_node: int = 2) -> list[Rank]:
    """Return the ranks of a sound job on nodes with two H100 each."""
    return [
        Rank(
            rank=number,
            local=number % per_node,
            host=f"node{number // per_node}",
            address=f"10.0.0.{number // per_node}",
            interface="eth0",
            gloo=f"10.0.0.{number // per_node}",
            device=f"{per_node} × NVIDIA H100",
            gpu=f"GPU-{number}",
            free_bytes=79 * GIB,
            versions=ALIKE,
        )
        for number in range(nodes * per_node)
    ]


def written(folder: Path, model: Path, *overrides: str) -> Config:
    """Write a small run's rows and configuration into a folder, and return the configuration."""
    rows = [{"prompt": "1+1=", "answer": "2", "data_source": "x"}] * 4
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "run.yaml").write_text(
        f"model: {{path: {model}, init: random}}\n"
        f"data: {{files: [{folder / 'train.jsonl'}], answer_key: answer, max_prompt_tokens: 16}}\n"
        f"output_dir: {folder / 'runs'}\n"
        "rollout: {max_response_tokens: 16, group_size: 2}\n"
        "batch: {max_tokens: 64}\nreward: {overlong: {cache: 4}}\n"
    )
    return load_config(folder / "run.yaml", overrides)
