"""Memory by category on one process, and peaks with a made-up GPU. Bytes on meshes, by hand: test_memory.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dapo_mcore.actor.memory_use import CATEGORIES, GIB, MemoryUse
from dapo_mcore.observe.metrics import describe
from tests.actor import parity
from tests.actor.parity import Mesh


@pytest.fixture(scope="module")
def actor(alone: Any) -> Any:
    return parity.build_actor(parity.make_config(Mesh(), algo__kl__coef=0.1), alone)


def test_a_run_says_at_its_start_what_it_holds(actor):
    """132,160 parameters of 4 bytes, padded to 132,224 in the optimizer's buffers; it has no moments yet."""
    line = MemoryUse(actor).start_line()
    assert line.startswith(
        "memory of a rank, at most: weights 0.5 MiB, reference 0.5 MiB, gradients 0.5 MiB, head 0.2 MiB;"
    )


def test_every_category_is_described():
    assert all(describe(f"memory/{name}_gib") for name in CATEGORIES)


def test_a_cpu_has_no_peaks(actor):
    use = MemoryUse(actor)
    with use.phase("update"):
        pass
    assert not any("peak" in name or "activations" in name for name in use.metrics())


def test_a_peak_is_that_of_its_phase(actor, monkeypatch):
    """10 GiB are allocated before scoring, at most 14 in it, and at most 31 in the gradient steps, from 12 on."""
    counts = iter([(10, 14), (12, 31)])
    now: dict[str, int] = {}

    def memory_allocated() -> int:
        before, now["peak"] = next(counts)
        return before * GIB

    monkeypatch.setattr(torch.cuda, "memory_allocated", memory_allocated)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: now.update(reset=now["peak"]))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: now["reset"] * GIB)
    layout = SimpleNamespace(
        device=torch.device("cuda"), is_last_stage=False, max_over_ranks=lambda own: own.clamp(min=3 * GIB)
    )
    fields = ("policy", "reference", "ddp", "optimizer", "config", "critic")
    use = MemoryUse(SimpleNamespace(**{name: getattr(actor, name) for name in fields}, layout=layout))
    for phase in ("score", "update"):
        with use.phase(phase):
            pass
    found = use.metrics()
    assert found["memory/score_peak_gib"] == 14 and found["memory/update_peak_gib"] == 31
    assert found["memory/update_activations_gib"] == 19
    assert found["memory/score_activations_gib"] == 4
    assert found["memory/weights_gib"] == 3, "the largest of all ranks"
    assert use.metrics()["memory/update_peak_gib"] == 3, "of the next step"
