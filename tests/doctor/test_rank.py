from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dapo_mcore.doctor.finding import hint, ok
from dapo_mcore.doctor.rank import describe_rank, from_json, to_json
from dapo_mcore.errors import ConfigError
from tests.doctor.environments import ALIKE, job


@pytest.fixture(autouse=True)
def fifth(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "127.0.0.1",
        "SLURMD_NODENAME": "gpu-17",
    }.items():
        monkeypatch.setenv(name, value)


def test_a_node_has_the_name_that_slurm_can_leave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    own = describe_rank(ALIKE, {})
    assert (own.where, own.address, own.interface) == ("rank 5 on gpu-17", "127.0.0.1", "lo")
    assert (own.local, own.device, own.gpu) == (1, "CPU", "")


@pytest.mark.parametrize(("visible", "gpu", "free"), [(8, "GPU-1", 7), (1, "", 0)])
def test_a_rank_tells_which_gpus_it_sees(visible: int, gpu: str, free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=f"GPU-{number}"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (7, 80))
    own = describe_rank({}, {})
    assert (own.device, own.gpu, own.free_bytes) == (f"{visible} × NVIDIA H100", gpu, free)


def test_an_unknown_name_of_rank_0_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    with pytest.raises(
        ConfigError, match=r"gpu-17 cannot find rank 0 at MASTER_ADDR no-such-host\.invalid.*--local-addr"
    ):
        describe_rank({}, {})


def test_a_record_survives_the_way_through_the_store() -> None:
    rank = replace(job()[0], port=7, findings={"machine": (ok("a", "b"), hint("c", "d", "e")), "run": ()})
    assert from_json(to_json(rank)) == rank
    assert rank.facts().keys().isdisjoint({"findings", "versions", "port"})
