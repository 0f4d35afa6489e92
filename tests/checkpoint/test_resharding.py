"""A checkpoint of any mesh loads on any other, bit for bit: weights, fp32 copies, moments, steps.

Tied and untied embeddings, fp32 and bf16, odd factors, several buckets of gradients, experts, the distributed and the plain
optimizer, and two versions of megatron-core. Trajectories after a resume: test_checkpoint.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.actor.parity import Mesh
from tests.checkpoint.resharding import Case, as_json, run

ROOT = Path(__file__).parents[2]
NEXT = os.environ.get("DAPO_MCORE_MEGATRON_NEXT")

FEW = [
    Case("tied", Mesh(tensor=2, pipeline=2)),
    Case("tied", Mesh(pipeline=2, virtual=2)),
    Case("tied", Mesh(pipeline=2, data=3)),
    Case("tied", Mesh(pipeline=2, context=3)),
    Case("tied", Mesh(tensor=3, data=2), bucket_size=700),
    Case("tied", Mesh(pipeline=2, data=5)),
    Case("tied", Mesh()),
    Case("tied bf16", Mesh(pipeline=2, data=3), bucket_size=700),
    Case("tied bf16", Mesh(tensor=2), distributed=False),
    Case("tied bf16", Mesh(tensor=2, pipeline=2)),
    Case("untied bf16", Mesh(tensor=2, context=3), bucket_size=700),
    Case("untied bf16", Mesh(data=5)),
    Case("untied bf16", Mesh(pipeline=4)),
    Case("experts", Mesh(data=4, expert=2)),
    Case("experts", Mesh(pipeline=2, virtual=2, data=3, expert=3), bucket_size=3000),
    Case("experts", Mesh(tensor=2, data=2, sequence_parallel=True, expert=2, expert_tensor=1)),
    Case("experts", Mesh(), distributed=False),
]
"""50 pairs."""

MANY = [
    Case(model, mesh, bucket_size=bucket_size)
    for model in ("tied", "tied bf16", "untied bf16")
    for mesh, bucket_size in (
        (Mesh(tensor=2, pipeline=2, data=3), None),
        (Mesh(pipeline=2, data=6), None),
        (Mesh(pipeline=2, data=6), 500),
        (Mesh(tensor=3, pipeline=2, context=2), None),
        (Mesh(pipeline=4, data=3), None),
        (Mesh(tensor=6, data=2), 700),
        (Mesh(context=3, data=3), 2000),
        (Mesh(data=7), 700),
    )
] + [
    Case("experts", Mesh(tensor=2, pipeline=2, data=3, sequence_parallel=True, expert=3)),
    Case("experts", Mesh(tensor=3, data=2, sequence_parallel=True, expert=2)),
    Case("experts", Mesh(pipeline=2, data=6, expert=3), bucket_size=3000),
    Case("experts", Mesh(context=2, data=3, expert=6)),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    """The folder of FEW's checkpoints, and the tensors that differed."""
    folder = tmp_path_factory.mktemp("meshes")
    return folder, run(FEW, folder)


def test_every_mesh_loads_what_every_earlier_one_saved(saved: tuple[Path, dict[str, list[str]]]) -> None:
    found = saved[1]
    assert len(found) == 50
    assert {pair: names for pair, names in found.items() if names} == {}


@pytest.mark.skipif(not NEXT, reason="set DAPO_MCORE_MEGATRON_NEXT to a folder with a newer megatron-core unpacked")
def test_two_versions_of_megatron_read_each_other(saved: tuple[Path, dict[str, list[str]]]) -> None:
    folder = saved[0]
    newer = [Case("tied", Mesh(pipeline=2, data=2)), Case("experts", Mesh(data=2, expert=2))]
    command = [sys.executable, "-m", "tests.checkpoint.resharding", str(folder), as_json(newer)]
    environment = os.environ | {"PYTHONPATH": f"{NEXT}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["version"] != version("megatron-core")
    found = told["found"] | run([Case("tied", Mesh(tensor=2)), Case("experts", Mesh(pipeline=2))], folder)
    assert len(found) == (7 + 1) + (4 + 1) + (8 + 1) + (5 + 1)
    assert {pair: names for pair, names in found.items() if names} == {}


@pytest.mark.slow
def test_more_meshes(tmp_path: Path) -> None:
    found = run(MANY, tmp_path)
    assert len(found) == 3 * 36 + 10
    assert {pair: names for pair, names in found.items() if names} == {}
