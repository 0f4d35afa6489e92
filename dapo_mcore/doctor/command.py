"""The command: which checks run, on this process or on all ranks of a job, and the exit status.

Change here: the order of the report, and what each rank of a job does.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dapo_mcore.config.file import load_config
from dapo_mcore.config.schema import Config
from dapo_mcore.doctor.devices import check_devices
from dapo_mcore.doctor.finding import Finding, State, wrong
from dapo_mcore.doctor.installed import Import, this_environment, version
from dapo_mcore.doctor.machine import check_machine, usable_memory
from dapo_mcore.doctor.meeting import Meeting, meet
from dapo_mcore.doctor.needs import Here, check_node, identity
from dapo_mcore.doctor.nodes import check_meeting, merge
from dapo_mcore.doctor.packages import ENGINE, check_packages, check_sglang
from dapo_mcore.doctor.rank import describe_rank, this_node
from dapo_mcore.doctor.report import Report, check_json, in_one_line, print_report, write_json
from dapo_mcore.doctor.run import check_config
from dapo_mcore.errors import shortened
from dapo_mcore.process.exit_status import record_failure
from dapo_mcore.process.launcher import check_launcher, routed_address

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
_PACKAGES, _GPUS, _MACHINE, _NODES, _RUN = "packages", "GPUs and their libraries", "machine", "nodes", "run"
_LONGEST_ERROR = 300


def run(file: Path | None, overrides: Sequence[str], json_file: Path | None) -> int:
    """Print the report and return the exit status: 0 if the configuration (or, without one, any) can run here, else 1.

    Raise ConfigError if the configuration does not hold, or if the launcher's variables describe no job, and OutputError if
    json_file cannot be written. In a job of several
    processes every rank must call this; rank 0 prints. Collectives: see meeting.meet.
    """
    config = load_config(file, overrides) if file is not None else None
    check_launcher(os.environ)
    rank, size = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if json_file is not None and rank == 0:
        check_json(json_file)
    node = _examine(config, size) if os.environ.get("LOCAL_RANK", "0") == "0" else None
    meeting, lost = _meet(node) if size > 1 else (Meeting(), [])
    if rank != 0 or node is None:
        return _status_of_other_rank(lost)
    groups = _groups_of_job(node, meeting, lost)
    if config is not None and node.can_check:
        addresses = [found.address for found in meeting.ranks if found.local == 0]
        groups[_RUN] = [*check_config(config, node.here, addresses), *groups[_RUN]]
    report = Report(
        str(file) if file else None, groups, {"host": this_node(), **node.facts, "ranks": _records(meeting)}
    )
    print_report(report)
    if json_file is not None:
        write_json(report, json_file)
    if report.reasons:
        record_failure(f"{report.verdict} {in_one_line(report.reasons[0])}")
    return 1 if report.reasons else 0


@dataclass
class _Node:
    """The findings of a node, by group, and what others need to know of it.

    can_check  False if packages are missing that a configuration is checked with
    folder     see rank.Rank
    """

    groups: dict[str, list[Finding]]
    facts: dict[str, Any]
    torch_error: str | None
    can_check: bool
    here: Here
    folder: str


def _examine(config: Config | None, size: int) -> _Node:
    """Return what this node finds about itself."""
    installed = this_environment()
    torch = installed.try_import("torch")
    gpus = torch.facts.get("gpus", [])
    engine = installed.try_import(ENGINE) if installed.has("transformer_engine") else None
    here = _here(gpus, engine, installed.has("ray"), size)
    sglang = _sglang(config, here)
    here = replace(here, has_sglang=sglang.state is not State.WRONG)
    packages = check_packages(installed, torch, engine, on_gpu=bool(gpus))
    needed = ("Python", "torch", "megatron-core")
    can_check = not any(found.state is State.WRONG and found.name in needed for found in packages)
    groups = {
        _PACKAGES: [*packages, sglang],
        _GPUS: check_devices(installed, torch, engine),
        _MACHINE: check_machine(_hosts(config, size), on_gpu=bool(gpus)),
        _RUN: check_node(config, here) if config is not None and can_check else [],
    }
    facts = {"gpus": gpus, "versions": {name: installed.version(name) for name in _COMPARED}}
    folder = identity(config.run_dir) if config is not None else ""
    return _Node(groups, facts, torch.error, can_check, here, folder)


def _here(gpus: Sequence[dict[str, Any]], engine: Import | None, has_ray: bool, size: int) -> Here:
    rank, local_ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return Here(
        num_gpus=len(gpus),
        has_engine=engine is not None and engine.error is None,
        has_ray=has_ray,
        processes=size if "WORLD_SIZE" in os.environ else None,
        local_ranks=local_ranks,
        node=rank // local_ranks,
        gpu=gpus[0]["name"] if gpus else "",
        memory=usable_memory(),
    )


def _hosts(config: Config | None, size: int) -> list[str]:
    """Return the addresses that calls within the run use, besides loopback."""
    hosts = []
    if size > 1:
        with suppress(OSError):  # meeting the others says why
            hosts.append(routed_address(os.environ))
    if config is not None and config.rollout.engine == "sglang":
        servers = config.rollout.sglang
        hosts += [urlsplit(url).hostname or "" for url in servers.urls] or [servers.host] * (servers.host != "node")
    return hosts


def _sglang(config: Config | None, here: Here) -> Finding:
    from dapo_mcore.config.sglang import SGLangConfig
    from dapo_mcore.rollout.sglang.client.versions import check_version, parse_version
    from dapo_mcore.rollout.sglang.launch.interpreter import python_of, version_of

    python = python_of(config.rollout.sglang if config else SGLangConfig())
    needed = config is not None and config.rollout.engine == "sglang" and bool(here.servers(config.rollout.sglang))
    return check_sglang(python, version_of, lambda version: check_version(parse_version(version), python), needed)


def _meet(node: _Node | None) -> tuple[Meeting, list[Finding]]:
    """Meet the other ranks. Return what rank 0 learns, and why this rank could not meet them."""
    if node and node.torch_error:
        return Meeting(), [_lost(node.torch_error, "install torch there as on the other nodes")]
    versions = {"Python": platform.python_version()} | {n: found for n in _COMPARED if (found := version(n))}
    findings = {title: tuple(found) for title, found in node.groups.items()} if node else {}
    try:
        return meet(describe_rank(versions, findings, node.folder if node else "")), []
    except (ImportError, OSError, RuntimeError) as error:
        return Meeting(), [
            _lost(str(error), "let nodes reach MASTER_ADDR on all ports, and read the other ranks' lines")
        ]


def _lost(error: str, remedy: str) -> Finding:
    words = shortened(" ".join(error.split()), _LONGEST_ERROR)
    return wrong(_NODES, f"rank {os.environ['RANK']} on {this_node()} cannot meet the others: {words}", remedy)


def _status_of_other_rank(lost: Sequence[Finding]) -> int:
    """Return 1 if this rank could not meet the others, and say why: rank 0 cannot know."""
    for found in lost:
        print(f"dapo-mcore doctor: {in_one_line(found)}", file=sys.stderr, flush=True)
        record_failure(in_one_line(found))
    return 1 if lost else 0


def _groups_of_job(node: _Node, meeting: Meeting, lost: Sequence[Finding]) -> dict[str, list[Finding]]:
    """Return the findings of all nodes by group, and those about the job: rank 0's own ones if there is no other."""
    firsts = {rank.host: rank for rank in reversed(meeting.ranks) if rank.local == 0}
    if not firsts:
        return {**node.groups, _NODES: list(lost)}
    nodes = [*reversed(firsts.items())]
    merged = {title: merge({host: rank.findings.get(title, ()) for host, rank in nodes}) for title in node.groups}
    return {**merged, _NODES: check_meeting(meeting)}


def _records(meeting: Meeting) -> list[dict[str, Any]]:
    times = [asdict(time) for time in meeting.times] or [{}] * len(meeting.ranks)
    return [{**rank.facts(), **time} for rank, time in zip(meeting.ranks, times, strict=True)]
