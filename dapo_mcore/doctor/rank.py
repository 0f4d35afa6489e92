"""What a rank of a job tells the others about itself and, for the first rank of a node, about its node.

Change here: a fact in which ranks or nodes can differ.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dapo_mcore.doctor.finding import Finding, State
from dapo_mcore.doctor.network import gloo_address
from dapo_mcore.errors import ConfigError
from dapo_mcore.process.launcher import routed_address


@dataclass(frozen=True)
class Rank:
    """One rank's record.

    local       its number on its node
    address     of its node on the way to rank 0, where other nodes reach its servers; interface: the one that has it
    gloo        the address that gloo listens on
    device      the GPUs that it sees, `8 × NVIDIA H100 80GB HBM3`, or `CPU`; gpu: the UUID of its own one, "" without
    free_bytes  of its GPU; of the machine's memory without one
    folder      which folder it sees at output_dir, to compare it with the others'; "" without a configuration
    port        where it listens while others try to reach its node; 0 if it is not the first rank of its node
    findings    about its node, by group; empty if it is not the first rank of its node
    """

    rank: int
    local: int
    host: str
    address: str
    interface: str
    gloo: str
    device: str
    gpu: str
    free_bytes: int
    versions: Mapping[str, str]
    folder: str = ""
    port: int = 0
    findings: Mapping[str, tuple[Finding, ...]] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return f"rank {self.rank} on {self.host}"

    def facts(self) -> dict[str, Any]:
        """Return the record without findings and versions, for the report's JSON file."""
        return {
            name: value for name, value in vars(self).items() if name not in ("findings", "versions", "folder", "port")
        }


def to_json(rank: Rank) -> str:
    content = asdict(replace(rank, findings={}))
    content["findings"] = {
        group: [{**asdict(found), "state": found.state.value} for found in findings]
        for group, findings in rank.findings.items()
    }
    return json.dumps(content)


def from_json(text: str) -> Rank:
    content = json.loads(text)
    findings = {
        group: tuple(Finding(**{**found, "state": State(found["state"])}) for found in findings)
        for group, findings in content.pop("findings").items()
    }
    return Rank(**content, findings=findings)


def describe_rank(versions: Mapping[str, str], findings: Mapping[str, tuple[Finding, ...]], folder: str = "") -> Rank:
    """Return this rank's own record. Raise ConfigError if it cannot find rank 0."""
    import psutil

    addresses = {name: [a.address for a in all_of] for name, all_of in psutil.net_if_addrs().items()}
    address, local = _routed_address(), int(os.environ.get("LOCAL_RANK", 0))
    device, gpu, free_bytes = _device(local)
    return Rank(
        rank=int(os.environ["RANK"]),
        local=local,
        host=this_node(),
        address=address,
        interface=next((name for name, own in addresses.items() if address in own), "no interface"),
        gloo=gloo_address(os.environ, addresses, socket.gethostname()),
        device=device,
        gpu=gpu,
        free_bytes=free_bytes,
        versions=versions,
        folder=folder,
        findings=findings,
    )


def _device(local: int) -> tuple[str, str, int]:
    """Return the GPUs that this rank sees, the UUID of its own one, and its free bytes; without a GPU those of the machine."""
    import psutil
    import torch

    if not torch.cuda.is_available():
        return "CPU", "", psutil.virtual_memory().available
    count = torch.cuda.device_count()
    if local >= count:  # its launcher hides the GPU that belongs to it
        return f"{count} × {torch.cuda.get_device_name(0)}", "", 0
    uuid, free_bytes = torch.cuda.get_device_properties(local).uuid, torch.cuda.mem_get_info(local)[0]
    return f"{count} × {torch.cuda.get_device_name(local)}", str(uuid), free_bytes


def this_node() -> str:
    """Return this machine's name, as Slurm calls it if it started this process: so it can be left out of a job."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _routed_address() -> str:
    try:
        return routed_address(os.environ)
    except OSError as error:
        raise ConfigError(
            f"{this_node()} cannot find rank 0 at MASTER_ADDR {os.environ.get('MASTER_ADDR')}: {error}; on the first node give "
            "torchrun an address that all nodes can reach, as --local-addr and in --rdzv-endpoint"
        ) from error
