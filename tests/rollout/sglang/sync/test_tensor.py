"""Weights by memory that servers open: what they find there, what is left behind, and who is refused."""

from __future__ import annotations

import asyncio
import base64
import inspect
import io
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.multiprocessing import reductions

from dapo_mcore.architecture.manifest import Bucket, buckets
from dapo_mcore.errors import ConfigError, RolloutError
from dapo_mcore.rollout.sglang.engine import SGLangEngine
from dapo_mcore.rollout.sglang.pool.server import Server
from dapo_mcore.rollout.sglang.pool.update import Transaction
from dapo_mcore.rollout.sglang.sync import shared_bucket
from dapo_mcore.rollout.sglang.sync.shared_bucket import SharedBucket
from dapo_mcore.rollout.sglang.sync.tensor import TensorSender
from dapo_mcore.rollout.sglang.sync.weight_format import quantized
from tests.rollout.sglang.asserts import assert_an_error_where_memory_cannot_be_opened, assert_whole
from tests.rollout.sglang.fake_server import fake_python
from tests.rollout.sglang.fake_weights import Unpickler
from tests.rollout.sglang.serving import (
    STOP,
    bucket_a_tensor,
    engine,
    gathered,
    order,
    params,
    prompts,
    servers,
    settings,
    shared_files,
    states,
    tiny_config,
    told,
    wait_for,
    weights,
)


def sums(stream: Iterator[tuple[str, torch.Tensor]]) -> dict[str, float]:
    return {name: tensor.float().sum().item() for name, tensor in stream}


def opened(shared: SharedBucket) -> Bucket:
    """The tensors as a server reads them."""
    content = Unpickler(io.BytesIO(base64.b64decode(shared.handle()))).load()
    flat = content["flattened_tensor"]
    return [(m.name, flat[m.start_idx : m.end_idx].view(m.dtype).reshape(m.shape)) for m in content["metadata"]]


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
    shared = SharedBucket(bucket)
    assert bucket == [] and len(shared_files()) == 1
    for (name, tensor), (expected_name, expected) in zip(opened(shared), mixed_bucket(), strict=True):
        assert name == expected_name and tensor.dtype == expected.dtype and tensor.shape == expected.shape
        assert torch.equal(tensor.float(), expected.float())
    shared.close()
    assert shared_files() == []


def test_sharing_changes_no_setting_of_the_process_and_needs_no_sglang():
    before = torch.multiprocessing.get_sharing_strategy()
    shared = SharedBucket(mixed_bucket())
    shared.handle()
    assert torch.multiprocessing.get_sharing_strategy() == before == "file_descriptor"
    shared.close()
    assert "sglang" not in sys.modules


def test_a_bucket_that_is_only_dropped_leaves_no_file():
    shared = SharedBucket(mixed_bucket())
    shared.handle()  # sent, and never opened
    del shared
    assert shared_files() == []


@pytest.fixture
def full_dev_shm(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shared_bucket.os, "posix_fallocate", full)


def test_a_full_dev_shm_is_an_error_with_the_room_and_not_a_bus_error(full_dev_shm):
    with pytest.raises(
        RolloutError, match=r"needs 64 MiB of shared memory .*/dev/shm has \d+ MiB free \(No space left"
    ):
        SharedBucket([("a", torch.zeros(2**24))])
    assert shared_files() == []


def test_memory_of_a_killed_trainer_is_deleted_by_torchs_manager():
    """kill -9 of the process alone; what kills its `torch_shm_manager` as well leaves the file."""
    code = (
        "import sys, time, torch; sys.path.insert(0, sys.argv[1])\n"
        "from dapo_mcore.rollout.sglang.sync.shared_bucket import SharedBucket\n"
        "shared = SharedBucket([('a', torch.ones(9))]); print(shared.handle(), flush=True); time.sleep(60)\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code, os.getcwd()], stdout=subprocess.PIPE)
    assert trainer.stdout.readline() and shared_files(trainer.pid)
    trainer.kill()
    trainer.wait()
    wait_for(lambda: not shared_files(trainer.pid), 60)


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_every_rank_takes_every_tensor_in_many_buckets_and_nothing_is_left(tmp_path, tensor_parallel):
    with engine(tmp_path, num_servers=2, sync="tensor", tensor_parallel=tensor_parallel) as made:
        made.update_weights(weights(1), version=0)
        bucket_a_tensor(made)
        made.update_weights(weights(2), version=1)
        for server in servers(made):
            now = told(server)
            assert now["weight_version"] == made.pool.weight_version and not now["session"]
            assert now["counts"]["buckets"] == 1 + len(list(weights(2)))
            assert now["weights"] == pytest.approx(sums(weights(2)), rel=1e-4, abs=1e-4)
        numbers = made.metrics()
        assert numbers["sync/bytes"] == sum(tensor.nbytes for _, tensor in weights(0))
        assert numbers["sync/tensor_s"] > 0 and numbers["sync/gb_per_s"] > 0
        assert shared_files() == []
        made.update_weights(gathered(made, 3), version=1)
        assert all(told(s)["weights"] == pytest.approx(sums(weights(3)), rel=1e-4, abs=1e-4) for s in servers(made))
        assert shared_files() == []
        asked = prompts(3)
        assert_whole(made.generate(asked, params(8)), asked, 8, version=1)


@pytest.mark.parametrize("version", ["0.5.15", "0.5.20"])
def test_servers_without_sessions_are_understood(tmp_path, version):
    with engine(tmp_path, python=fake_python(tmp_path, version), sync="tensor") as made:
        made.update_weights(weights(0), version=1)
        assert told(servers(made)[0])["weights"] == pytest.approx(sums(weights(0)), rel=1e-4, abs=1e-4)


def test_the_fp8_stream_goes_through(tmp_path):
    given = settings(fake_python(tmp_path), sync="tensor", quantize="fp8")
    made = SGLangEngine(given, tiny_config(), stop_token_ids=(STOP,), dtype=torch.bfloat16, folder=tmp_path / "servers")
    try:
        made.update_weights(((name, tensor.bfloat16()) for name, tensor in weights(3)), version=1)
        expected = sums(quantized((name, tensor.bfloat16()) for name, tensor in weights(3)))
        assert any(name.endswith("_scale_inv") for name in expected)
        assert told(servers(made)[0])["weights"] == pytest.approx(expected, rel=1e-3, abs=1e-3)
    finally:
        made.close()


@pytest.mark.parametrize("where", ["bucket 1", "bucket 5"])
def test_a_server_that_dies_at_a_bucket_is_left_out_and_the_others_go_on(tmp_path, where):
    with engine(tmp_path, num_servers=2, sync="tensor") as made:
        bucket_a_tensor(made)
        made.update_weights(weights(0), version=1)
        first, second = servers(made)
        order(first, "die", where=where)
        made.update_weights(weights(1), version=2)
        assert shared_files() == []
        asked = prompts(10)
        assert_whole(made.generate(asked, params(16)), asked, 16, version=2)
        wait_for(lambda: states(made) == ["waiting", "serving"])
        made.update_weights(weights(3), version=3)
        assert len(made.pool.serving) == 2 and shared_files() == []
        assert told(first)["weights"] == pytest.approx(told(second)["weights"])


def test_servers_that_cannot_open_the_memory_are_an_error_with_the_remedy(tmp_path, monkeypatch):
    with engine(tmp_path, sync="tensor", restart_budget=0) as made:
        assert_an_error_where_memory_cannot_be_opened(made, monkeypatch)


def test_a_stream_that_breaks_off_leaves_no_memory_and_the_next_one_is_taken(tmp_path):
    with engine(tmp_path, sync="tensor") as made:
        bucket_a_tensor(made)
        made.update_weights(weights(0), version=1)
        whole = list(weights(1))
        with pytest.raises(RolloutError, match="lacks 1 of"):
            made.update_weights(iter(whole[:-1]), version=2)
        assert made.weight_version == 1 and shared_files() == []
        wait_for(lambda: states(made) == ["waiting"])
        made.update_weights(iter(whole), version=2)
        assert told(servers(made)[0])["weights"] == pytest.approx(sums(iter(whole)), rel=1e-4, abs=1e-4)


async def no_buckets() -> AsyncIterator[tuple[SharedBucket, str | None]]:
    for nothing in ():
        yield nothing


@pytest.mark.parametrize("num_read", [0, 1])
def test_a_bucket_stays_as_it_is_until_no_rank_reads_it(num_read):
    """The answer for it vouches for one rank's copy, the answer for the one after it for every rank's."""
    sender, before = TensorSender([], 0), None
    pool = [Server(SimpleNamespace(url="http://a:1"), num_ranks=1 + num_read)]
    asyncio.run(sender.send(Transaction([], "1", 1.0, SimpleNamespace(), pool=pool), no_buckets()))
    for number, (bucket, _) in enumerate(buckets(weights(0), 0)):
        tensors = list(bucket)
        shared = sender.pack(bucket)
        assert len(shared_files()) == min(number, num_read) + 1
        for expected, found in [(tensors, shared)] + ([before] if before and num_read else []):
            for (name, tensor), (opened_name, opened_tensor) in zip(expected, opened(found), strict=True):
                assert name == opened_name and torch.equal(tensor, opened_tensor)
        before = tensors, shared
    sender.close()
    assert shared_files() == []


def test_memory_is_used_again_where_it_fits():
    sizes = {"fits": (900, 1000), "too small": (1001, 1000), "too large": (400, 1000)}
    for what, (now, then) in sizes.items():
        used = SharedBucket([("a", torch.zeros(then, dtype=torch.uint8))])
        (file,) = shared_files()
        shared = SharedBucket([("b", torch.ones(now, dtype=torch.uint8))], used)
        assert (shared_files() == [file]) == (what == "fits") and len(shared_files()) == 1
        ((name, tensor),) = opened(shared)
        assert name == "b" and tensor.sum() == now
        shared.close()
    assert shared_files() == []


def tensors_to_gather(sender: TensorSender) -> dict[str, torch.Tensor]:
    """One larger than a bucket, with rows that are not in it, and one that is not."""
    sizes = {"large": (33, 8), "small": (32, 8)}
    made = {name: sender.empty(s, dtype=torch.float32, device=torch.device("cpu")) for name, s in sizes.items()}
    return {name: tensor.fill_(2.0)[:-1] for name, tensor in made.items()}


def test_a_tensor_larger_than_a_bucket_is_shared_where_it_was_gathered():
    sender = TensorSender([], bucket_bytes=32 * 8 * 4)
    tensors = tensors_to_gather(sender)
    (file,) = shared_files()
    for name, is_in_place in {"large": True, "small": False}.items():
        shared = sender.pack([(name, tensors[name])])
        assert (shared_files() == [file]) == is_in_place and len(shared_files()) == 1
        ours = tensors.pop(name).fill_(3.0)  # shows through where it was not copied
        ((found, tensor),) = opened(shared)
        assert found == name and tensor.shape == ours.shape and tensor.eq(3.0 if is_in_place else 2.0).all()
        del ours
        sender.close()
    assert shared_files() == []


def test_memory_of_a_tensor_that_is_never_sent_goes_with_it():
    sender = TensorSender([], bucket_bytes=32 * 8 * 4)
    tensors = tensors_to_gather(sender)
    assert len(shared_files()) == 1
    del tensors["large"]
    assert shared_files() == [], "the sender keeps no reference either"


def test_a_gather_goes_on_in_other_memory_where_dev_shm_is_full(full_dev_shm):
    """It could not be drained if it stopped; sharing the tensor tells."""
    sender = TensorSender([], bucket_bytes=32 * 8 * 4)
    tensors = tensors_to_gather(sender)
    assert shared_files() == [] and tensors["large"].eq(2.0).all()
    with pytest.raises(RolloutError, match="shared memory for a bucket"):
        sender.pack([("large", tensors["large"])])
    assert shared_files() == []


def test_servers_on_other_machines_are_refused_at_the_start():
    urls = ["http://127.0.0.1:30000", "http://localhost:30001", "http://[::1]:30002"]
    TensorSender(urls, 0)
    far = "http://192.0.2.7:30000"
    with pytest.raises(
        ConfigError, match=rf"1 of 4 servers are not at an address of it: {far}; .* or sync distributed"
    ):
        TensorSender([*urls, far], 0)


def test_the_arguments_of_a_cuda_handle_are_where_they_are_taken_from():
    names = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    assert names[shared_bucket._DEVICE] == "storage_device"
    assert names[shared_bucket._COUNTER] == ["ref_counter_handle", "ref_counter_offset"]


class Counters:
    """torch's counters of openers of GPU memory, which are uint64: memory is freed when its counter is 0."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.value = {(b"/torch_1_2", 5): np.uint64(1)}
        uuid = SimpleNamespace(uuid="GPU-1")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: uuid)
        monkeypatch.setattr(torch.UntypedStorage, "_release_ipc_counter_cuda", self.count_out, raising=False)
        monkeypatch.setattr(reductions, "reduce_tensor", self.reduce)

    def reduce(self, tensor: torch.Tensor) -> tuple[Callable[..., None], tuple[object, ...]]:
        """What torch.multiprocessing makes of a CUDA tensor."""
        storage = (torch.UntypedStorage, tensor.dtype, 0, b"handle", tensor.nbytes, 0, False)
        return self.open_and_let_go, (torch.Tensor, tensor.shape, (1,), 0, *storage, b"/torch_1_2", 5, b"event", True)

    def open_and_let_go(self, *arguments: object) -> None:
        assert arguments[6] == "GPU-1" and arguments[7] == b"handle" and arguments[13:] == (b"event", True)
        self.count_out(*arguments[11:13])

    def count_out(self, handle: object, offset: object) -> None:
        if (handle, offset) in self.value:  # torch passes over one that it cannot open
            with np.errstate(over="ignore"):
                self.value[handle, offset] -= np.uint64(1)


@pytest.mark.parametrize("num_openers", [0, 1, 3])
def test_gpu_memory_is_freed_whether_none_or_many_have_opened_it(monkeypatch, num_openers):
    counters = Counters(monkeypatch)
    rebuild, arguments = shared_bucket._CudaMemory(torch.zeros(8, dtype=torch.uint8)).opening().__reduce__()
    for _ in range(num_openers):
        rebuild(*arguments)
    assert list(counters.value.values()) == [0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_of_a_gpu_is_opened_by_another_process():
    """Three times, once for each handle; then it is given back."""
    torch.cuda.init()
    before = torch.cuda.memory_allocated()
    shared = SharedBucket([(name, tensor.cuda()) for name, tensor in mixed_bucket()])
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
    assert done.stdout.splitlines() == [str(sums(iter(mixed_bucket())))] * 3
    assert torch.cuda.memory_allocated() > before
    shared.close()
    assert torch.cuda.memory_allocated() == before
