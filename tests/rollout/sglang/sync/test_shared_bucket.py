"""A bucket in shared memory: what another process reads there, and that nothing is left behind."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.multiprocessing import reductions

from dapo_mcore.architecture.manifest import Bucket
from dapo_mcore.errors import RolloutError
from dapo_mcore.rollout.sglang.sync import shared_bucket
from dapo_mcore.rollout.sglang.sync.shared_bucket import SharedBucket
from tests.rollout.sglang.fake_weights import views
from tests.rollout.sglang.serving import shared_files, wait_for


def mixed_bucket() -> Bucket:
    return [
        ("odd", torch.arange(3, dtype=torch.uint8)),
        ("transposed", torch.arange(6, dtype=torch.float32).reshape(2, 3).T),
        ("fp8", torch.tensor([1.5, -448.0, 0.0]).to(torch.float8_e4m3fn)),
        ("empty", torch.empty(0, 4, dtype=torch.bfloat16)),
        ("scalar", torch.tensor(2.5, dtype=torch.bfloat16)),
    ]


def test_a_handle_opens_every_tensor_bit_for_bit_and_closing_leaves_no_file():
    bucket = mixed_bucket()
    shared = SharedBucket.copy_of(bucket)
    assert bucket == [] and len(shared_files()) == 1
    for (name, tensor), (expected_name, expected) in zip(views(shared.handle()).items(), mixed_bucket(), strict=True):
        assert name == expected_name and tensor.dtype == expected.dtype and tensor.shape == expected.shape
        assert torch.equal(tensor.float(), expected.float())
    shared.close()
    assert shared_files() == []


def test_sharing_changes_no_setting_of_the_process_and_needs_no_sglang():
    before = torch.multiprocessing.get_sharing_strategy()
    shared = SharedBucket.copy_of(mixed_bucket())
    shared.handle()
    assert torch.multiprocessing.get_sharing_strategy() == before == "file_descriptor"
    shared.close()
    assert "sglang" not in sys.modules


def test_a_bucket_that_is_only_dropped_leaves_no_file():
    shared = SharedBucket.copy_of(mixed_bucket())
    shared.handle()  # sent, and never opened
    del shared
    assert shared_files() == []


def test_a_full_dev_shm_is_an_error_with_the_free_room_and_not_a_bus_error(full_dev_shm):
    with pytest.raises(
        RolloutError, match=r"needs 64 MiB of shared memory .*/dev/shm has \d+ MiB free \(No space left"
    ):
        SharedBucket.copy_of([("a", torch.zeros(2**24))])
    assert shared_files() == []


def test_memory_is_used_again_if_the_size_fits():
    sizes = {"fits": (900, 1000), "too small": (1001, 1000), "too large": (400, 1000)}
    for what, (now, then) in sizes.items():
        used = SharedBucket.copy_of([("a", torch.zeros(then, dtype=torch.uint8))])
        (file,) = shared_files()
        shared = SharedBucket.copy_of([("b", torch.ones(now, dtype=torch.uint8))], used)
        assert (shared_files() == [file]) == (what == "fits") and len(shared_files()) == 1
        ((name, tensor),) = views(shared.handle()).items()
        assert name == "b" and tensor.sum() == now
        shared.close()
    assert shared_files() == []


def test_memory_of_a_killed_trainer_is_deleted_by_torchs_manager():
    """Only the process is killed. If its `torch_shm_manager` is killed as well, the file stays."""
    code = (
        "import sys, time, torch; sys.path.insert(0, sys.argv[1])\n"
        "from dapo_mcore.rollout.sglang.sync.shared_bucket import SharedBucket\n"
        "shared = SharedBucket.copy_of([('a', torch.ones(9))]); print(shared.handle(), flush=True); time.sleep(60)\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code, os.getcwd()], stdout=subprocess.PIPE)
    assert trainer.stdout.readline() and shared_files(trainer.pid)
    trainer.kill()
    trainer.wait()
    wait_for(lambda: not shared_files(trainer.pid), 60)


def test_torch_has_the_arguments_of_a_cuda_handle_where_we_take_them_from():
    names = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    assert names[shared_bucket._DEVICE] == "storage_device"
    assert names[shared_bucket._COUNTER] == ["ref_counter_handle", "ref_counter_offset"]


class Counters:
    """torch's counters of openers of GPU memory (uint64). Memory is freed when its counter is 0."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.value = {(b"/torch_1_2", 5): np.uint64(1)}
        uuid = SimpleNamespace(uuid="GPU-1")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: uuid)
        monkeypatch.setattr(torch.UntypedStorage, "_release_ipc_counter_cuda", self.count_out, raising=False)
        monkeypatch.setattr(reductions, "reduce_tensor", self.reduce)

    def reduce(self, tensor: torch.Tensor) -> tuple[Callable[..., None], tuple[object, ...]]:
        """Return what torch.multiprocessing makes of a CUDA tensor."""
        storage = (torch.UntypedStorage, tensor.dtype, 0, b"handle", tensor.nbytes, 0, False)
        return self.open_and_let_go, (torch.Tensor, tensor.shape, (1,), 0, *storage, b"/torch_1_2", 5, b"event", True)

    def open_and_let_go(self, *arguments: object) -> None:
        assert arguments[6] == "GPU-1" and arguments[7] == b"handle" and arguments[13:] == (b"event", True)
        self.count_out(*arguments[11:13])

    def count_out(self, handle: object, offset: object) -> None:
        if (handle, offset) in self.value:  # torch ignores a counter that it cannot open
            with np.errstate(over="ignore"):
                self.value[handle, offset] -= np.uint64(1)


@pytest.mark.parametrize("num_openers", [0, 1, 3])
def test_gpu_memory_is_freed_however_many_processes_have_opened_it(monkeypatch, num_openers):
    counters = Counters(monkeypatch)
    rebuild, arguments = shared_bucket._CudaMemory(torch.zeros(8, dtype=torch.uint8)).opening(num_openers).__reduce__()
    for _ in range(num_openers):
        rebuild(*arguments)
    assert list(counters.value.values()) == [0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_of_a_gpu_is_opened_by_another_process():
    """It opens the memory three times, once per handle. Then the memory is given back."""
    torch.cuda.init()
    before = torch.cuda.memory_allocated()
    shared = SharedBucket.copy_of([(name, tensor.cuda()) for name, tensor in mixed_bucket()])
    reader = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch; from torch.multiprocessing import reductions; rebuild = reductions.rebuild_cuda_tensor\n"
        "def by_uuid(*a):\n"
        "    uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]\n"
        "    return rebuild(*a[:6], uuids.index(a[6]), *a[7:])\n"
        "reductions.rebuild_cuda_tensor = by_uuid\n"
        "from tests.rollout.sglang.fake_weights import opened\n"
        "for handle in sys.stdin.read().split():\n"
        "    print({name: tensor.float().sum().item() for name, tensor in opened(handle).items()})\n"
    )
    handles = "\n".join(shared.handle() for _ in range(3))
    done = subprocess.run(
        [sys.executable, "-c", reader, os.getcwd()], input=handles, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [str({name: tensor.float().sum().item() for name, tensor in mixed_bucket()})] * 3
    assert torch.cuda.memory_allocated() > before
    shared.close()
    assert torch.cuda.memory_allocated() == before
