from __future__ import annotations

from types import SimpleNamespace

from dapo_mcore.doctor.probe import loaded_libraries, torch_facts

MAPS = """\
7f00-7f01 r-xp 00000000 08:01 11   /usr/lib/x86_64-linux-gnu/libcudnn.so.9.14.0
7f02-7f03 r--p 00000000 08:01 11   /usr/lib/x86_64-linux-gnu/libcudnn.so.9.14.0
7f04-7f05 r-xp 00000000 08:01 12   /env/site-packages/nvidia/cudnn/lib/libcudnn_graph.so.9
7f06-7f07 r-xp 00000000 08:01 13   /opt/libcudnn/libother.so
7f08-7f09 rw-p 00000000 00:00 0
"""


def test_each_loaded_library_is_named_once_and_by_its_own_name() -> None:
    assert loaded_libraries("libcudnn", MAPS) == [
        "/env/site-packages/nvidia/cudnn/lib/libcudnn_graph.so.9",
        "/usr/lib/x86_64-linux-gnu/libcudnn.so.9.14.0",
    ]


def test_torch_tells_of_its_gpus() -> None:
    cuda = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        nccl=SimpleNamespace(version=lambda: (2, 28, 9)),
        get_device_properties=lambda number: SimpleNamespace(name=f"GPU {number}", major=9, minor=0),
        mem_get_info=lambda number: (50 - number, 80),
    )
    torch = SimpleNamespace(
        __version__="2.11.0+cu130",
        cuda=cuda,
        version=SimpleNamespace(cuda="13.0"),
        distributed=SimpleNamespace(is_nccl_available=lambda: True),
        backends=SimpleNamespace(cudnn=SimpleNamespace(version=lambda: 91900)),
    )
    facts = torch_facts(torch)
    assert (facts["version"], facts["cuda"], facts["cudnn"], facts["nccl"]) == ("2.11.0+cu130", "13.0", 91900, "2.28.9")
    assert facts["gpus"][1] == {"name": "GPU 1", "total_bytes": 80, "free_bytes": 49, "capability": [9, 0]}


def test_without_a_gpu_torch_is_not_asked_for_nccl_or_cudnn() -> None:
    torch = SimpleNamespace(
        __version__="2.13.0+cpu", cuda=SimpleNamespace(is_available=lambda: False), version=SimpleNamespace(cuda=None)
    )
    assert torch_facts(torch) == {"version": "2.13.0+cpu", "cuda": None, "cudnn": None, "nccl": None, "gpus": []}
