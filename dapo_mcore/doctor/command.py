"""The command: which checks run, on this process or on all ranks of a job, and the exit status.

Change here: the order of the report, and what each rank of a job does.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dapo_mcore.config.file import load_config
from dapo_mcore.config.schema import Config
from dapo_mcore.doctor.devices import check_devices
from dapo_mcore.doctor.finding import Finding, State, wrong
from dapo_mcore.doctor.installed import this_environment, version
from dapo_mcore.doctor.machine import check_machine
from dapo_mcore.doctor.nodes import check_nodes, check_times, describe_rank, meet, this_node
from dapo_mcore.doctor.packages import ENGINE, check_packages, check_sglang
from dapo_mcore.doctor.report import Report, in_one_line, print_report, write_json
from dapo_mcore.doctor.run import Here, check_config
from dapo_mcore.errors import shortened
from dapo_mcore.process.exit_status import record_failure
from dapo_mcore.process.launcher import check_launcher

_COMPARED = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "flash-attn",
    "triton",
    "transformers",
    "sglang",
    "ray",
    "dapo_mcore",
)
_NODES = "nodes"
_LONGEST_ERROR = 300


def run(file: Path | None, overrides: Sequence[str], json_file: Path | None) -> int:
    """Print the report and return the exit status: 0 if the configuration (or, without one, any) can run here, else 1.

    Raise ConfigError if the configuration does not hold, or if the launcher's variables describe no job. In a job of several
    processes every rank must call this; rank 0 prints. Collectives: see nodes.meet.
    """
    config = load_config(file, overrides) if file is not None else None
    check_launcher(os.environ)
    rank, size = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    is_first_here = os.environ.get("LOCAL_RANK", "0") == "0"
    machine = _check_this_machine(config) if is_first_here else None
    groups, facts = (machine.groups, machine.facts) if machine else ({}, {})
    if size > 1 and not (machine and machine.torch_error):
        groups["Nodes"], facts["ranks"] = _check_job([found for part in groups.values() for found in part])
    if rank != 0 or machine is None:
        return _status_of_other_rank(machine, groups.get("Nodes", []))
    if config is not None and not machine.blocks_config:
        groups[f"Run of {file}"] = check_config(config, machine.here(size))
    report = Report(str(file) if file else None, groups, {"host": this_node(), **facts})
    print_report(report)
    if json_file is not None:
        write_json(report, json_file)
    if report.reasons:
        record_failure(f"{report.verdict} {in_one_line(report.reasons[0])}")
    return 1 if report.reasons else 0


@dataclass
class _Machine:
    """The findings of a machine, by group, and what the check of a configuration needs of them."""

    groups: dict[str, list[Finding]]
    facts: dict[str, Any]
    torch_error: str | None
    has_engine: bool
    has_ray: bool

    @property
    def blocks_config(self) -> bool:
        """True if the packages that a configuration is checked with cannot be imported."""
        needed = ("Python", "torch", "megatron-core")
        return any(found.state is State.WRONG and found.name in needed for found in self.groups["Packages"])

    def here(self, size: int) -> Here:
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        processes = size if "WORLD_SIZE" in os.environ else None
        return Here(len(self.facts["gpus"]), self.has_engine, self.has_ray, processes, local_ranks)


def _check_this_machine(config: Config | None) -> _Machine:
    installed = this_environment()
    torch = installed.try_import("torch")
    gpus = torch.facts.get("gpus", [])
    engine = installed.try_import(ENGINE) if installed.has("transformer_engine") else None
    groups = {
        "Packages": [*check_packages(installed, torch, engine, on_gpu=bool(gpus)), _sglang(config)],
        "GPUs and their libraries": check_devices(installed, torch, engine),
        "Machine": check_machine(),
    }
    facts = {"gpus": gpus, "versions": {name: installed.version(name) for name in _COMPARED}}
    return _Machine(groups, facts, torch.error, engine is not None and engine.error is None, installed.has("ray"))


def _sglang(config: Config | None) -> Finding:
    from dapo_mcore.config.sglang import SGLangConfig
    from dapo_mcore.rollout.sglang.client.versions import check_version, parse_version
    from dapo_mcore.rollout.sglang.launch.interpreter import python_of, version_of

    python = python_of(config.rollout.sglang if config else SGLangConfig())
    return check_sglang(python, version_of, lambda version: check_version(parse_version(version), python))


def _check_job(local: Sequence[Finding]) -> tuple[list[Finding], list[dict[str, Any]]]:
    """Return the findings about all ranks, and their records with times. Every rank calls it."""
    versions = {"Python": platform.python_version()} | {n: found for n in _COMPARED if (found := version(n))}
    worries = [found for found in local if found.state is not State.OK]
    try:
        ranks, times = meet(describe_rank(versions, worries, os.environ["MASTER_ADDR"]))
    except (ImportError, OSError, RuntimeError) as error:
        return [_lost(error)], []
    records = [{**asdict(replace(rank, worries=())), **asdict(time)} for rank, time in zip(ranks, times, strict=True)]
    return [*check_nodes(ranks), *check_times(ranks, times)], records


def _lost(error: Exception) -> Finding:
    words = shortened(" ".join(str(error).split()), _LONGEST_ERROR)
    return wrong(
        _NODES,
        f"rank {os.environ['RANK']} on {this_node()} cannot meet the others: {words}",
        "let nodes reach each other on all ports, name the interface in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, and read "
        "the other ranks' lines",
    )


def _status_of_other_rank(machine: _Machine | None, nodes: Sequence[Finding]) -> int:
    """Return 1 if this rank could not meet the others, and say why: rank 0 cannot know."""
    lost = [found for found in nodes if found.name == _NODES and found.state is State.WRONG]
    if machine and machine.torch_error:
        lost = [
            wrong(
                "torch",
                f"rank {os.environ['RANK']} on {this_node()}: {machine.torch_error}",
                "install it there",
            )
        ]
    for found in lost:
        print(f"dapo-mcore doctor: {in_one_line(found)}", file=sys.stderr, flush=True)
        record_failure(in_one_line(found))
    return 1 if lost else 0
