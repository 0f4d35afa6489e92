from __future__ import annotations

from pathlib import Path

import pytest

from dapo_mcore.doctor.devices import Cudnn, Library, check_cudnn, check_gpus, check_nccl, find_cudnn
from dapo_mcore.doctor.finding import State
from dapo_mcore.doctor.installed import Import
from tests.doctor.environments import environment, gpu, torch_with

TORCHS = Library("/env/nvidia/cudnn/lib", "9.19.0.56")
SYSTEMS = Library("/usr/lib/x86_64-linux-gnu", "9.14.0")


def test_alike_gpus_are_one_line() -> None:
    (found,) = check_gpus(torch_with(gpu(), gpu(free=75)), [], None)
    assert (found.state, found.detail) == (State.OK, "2 × NVIDIA H100 80GB HBM3, 80 GiB, compute capability 9.0")


def test_gpus_of_several_kinds_and_memory_in_use_are_named() -> None:
    found = check_gpus(
        torch_with(gpu(), gpu("A100", free=30, capability=(8, 0)), gpu("V100", capability=(7, 0))), [], None
    )
    assert [(f.name, f.state) for f in found] == [
        ("GPUs", State.OK),
        ("GPUs", State.OK),
        ("GPUs", State.HINT),
        ("GPUs", State.HINT),
        ("GPU memory", State.HINT),
    ]
    assert "no FP8" in found[1].detail
    assert "bf16 is emulated" in found[2].detail
    assert "3 kinds (A100, NVIDIA H100 80GB HBM3, V100)" in found[3].detail
    assert found[4].detail == "GPU 1 has 30.0 of 80.0 GiB free"
    assert "nvidia-smi" in found[4].remedy


@pytest.mark.parametrize(
    ("torch", "visible", "detail", "remedy"),
    [
        (torch_with(version="2.11.0+cpu", cuda=None), None, "built for CPUs", "install torch for CUDA"),
        (torch_with(), "", "CUDA_VISIBLE_DEVICES='' hides them", "unset CUDA_VISIBLE_DEVICES"),
        (torch_with(), None, "built for CUDA 13.0", "newer driver"),
        (Import("ImportError"), None, "torch cannot be imported", "newer driver"),
    ],
)
def test_gpus_that_torch_does_not_see_are_no_silent_fallback(torch, visible, detail: str, remedy: str) -> None:
    (found,) = check_gpus(torch, ["/dev/nvidia0"], visible)
    assert found.state is State.HINT
    assert detail in found.detail
    assert remedy in found.remedy


def test_without_a_gpu_a_run_computes_on_cpus_and_talks_by_gloo() -> None:
    assert check_gpus(torch_with(cuda=None), [], None)[0].state is State.FALLBACK
    assert "gloo" in check_nccl(torch_with(cuda=None)).detail
    assert check_nccl(torch_with(gpu())).detail == "2.28.9"


@pytest.mark.parametrize(
    ("cudnn", "engine", "state", "detail"),
    [
        (
            Cudnn(TORCHS, (SYSTEMS,), (TORCHS.folder, SYSTEMS.folder), False),
            True,
            State.WRONG,
            "two are loaded at once",
        ),
        (
            Cudnn(TORCHS, (SYSTEMS,), (TORCHS.folder, SYSTEMS.folder), False),
            False,
            State.HINT,
            "two are loaded at once",
        ),
        (Cudnn(TORCHS, (SYSTEMS,), (TORCHS.folder,), False), True, State.HINT, "9.14.0 in /usr/lib/x86_64-linux-gnu"),
        (Cudnn(TORCHS, (SYSTEMS,), (TORCHS.folder,), True), True, State.OK, "keeps off 9.14.0"),
        (Cudnn(TORCHS, (SYSTEMS,), (), False), False, State.OK, "also 9.14.0"),
        (Cudnn(TORCHS, (Library("/opt", "9.19.0"),), (), False), True, State.OK, "torch's 9.19.0.56"),
        (
            Cudnn(TORCHS, (Library("/opt", "9.19.0"),), (TORCHS.folder, "/opt"), False),
            True,
            State.OK,
            "torch's 9.19.0.56",
        ),
        (Cudnn(None, (SYSTEMS,), (), False), False, State.OK, "9.14.0 in"),
        (Cudnn(None, (), (), False), False, State.FALLBACK, "not in use"),
    ],
)
def test_two_versions_of_cudnn_are_seen(cudnn: Cudnn, engine: bool, state: State, detail: str) -> None:
    found = check_cudnn(cudnn, engine)
    assert found.state is state
    assert detail in found.detail
    assert ("LD_PRELOAD=$(ls $nv/cudnn/lib/libcudnn" in found.remedy) == (state in (State.WRONG, State.HINT))


def test_copies_of_cudnn_are_found_where_a_loader_would(tmp_path: Path) -> None:
    system, home = tmp_path / "system", tmp_path / "home"
    for folder, name in ((system, "libcudnn.so.9.14.0"), (home / "lib", "libcudnn.so.9.10.1")):
        folder.mkdir(parents=True)
        (folder / name).touch()
        (folder / "libcudnn.so.9").symlink_to(folder / name)
    cache = f"\tlibcudnn.so.9 (libc6,x86-64) => {system}/libcudnn.so.9\n\tlibc.so.6 (libc6) => /lib/libc.so.6\n"
    imports = [Import(cudnn_files=(f"{system}/libcudnn.so.9", f"{system}/libcudnn.so.9.14.0")), Import()]
    found = find_cudnn(environment({"nvidia-cudnn-cu13": "9.19.0.56"}), imports, {"CUDNN_HOME": str(home)}, cache)
    assert {(Path(library.folder).name, library.version) for library in found.others} == {
        ("lib", "9.10.1"),
        ("system", "9.14.0"),
    }
    assert found.loaded == (str(system),)
    assert found.torchs is not None
    assert not found.is_first
    first = find_cudnn(environment(), [], {"LD_LIBRARY_PATH": f"/usr/lib:{found.torchs.folder}"}, cache)
    assert first.is_first
    assert first.torchs is None
    behind = {"LD_PRELOAD": f"{system}/libcudnn.so.9", "LD_LIBRARY_PATH": found.torchs.folder}
    assert not find_cudnn(environment(), [], behind, "").is_first
