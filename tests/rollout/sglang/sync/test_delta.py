"""Changed values on their way to servers: when changes travel and when everything does, and faults that must not lose a change."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dapo_mcore.config.sglang import SGLangConfig
from dapo_mcore.errors import ConfigError, UpdateBroken
from dapo_mcore.rollout.sglang.engine import SGLangEngine
from dapo_mcore.rollout.sglang.sync import delta
from dapo_mcore.rollout.sglang.sync.delta import DeltaSender, Snapshot, check_delta
from dapo_mcore.rollout.sglang.sync.distributed import DistributedSender
from tests.rollout.sglang.fake_server import fake_python
from tests.rollout.sglang.serving import (
    engine,
    order,
    processes,
    servers,
    shared_files,
    states,
    told,
    wait_for,
    weights,
)

WHOLE = sum(tensor.nbytes for _, tensor in weights(0))


class Trainer:
    """Weights of which a share changes in each step, and the engine that serves them."""

    def __init__(self, made: SGLangEngine):
        self.made, self.weights = made, dict(weights(0))

    def step(self, share: float = 0.02) -> None:
        for name, tensor in self.weights.items():
            where = torch.rand(tensor.shape) < share
            self.weights[name] = torch.where(where, torch.randn(tensor.shape), tensor)

    def sync(self) -> dict[str, float]:
        self.made.update_weights(iter(self.weights.items()), self.made.weight_version + 1)
        return self.made.metrics()

    def step_and_sync(self, share: float = 0.02) -> bool:
        """Return True if changes were sent."""
        self.step(share)
        return "sync/delta_bytes" in self.sync()

    def assert_served(self, number: int | None = None) -> None:
        """Assert that the servers, or one of them, hold exactly these weights: their hashes are those of a whole sync."""
        for server in servers(self.made) if number is None else [servers(self.made)[number]]:
            assert server.post("/weights_checker", {"action": "checksum"})[1]["ranks"][0]["checksums"] == self.hashes()
            assert told(server)["weight_version"] == self.made.pool.weight_version

    def hashes(self) -> dict[str, str]:
        from hashlib import sha256

        return {name: sha256(t.contiguous().numpy().tobytes()).hexdigest()[:16] for name, t in self.weights.items()}


def started(folder: Path, **changes) -> Iterator[Trainer]:
    options = dict(num_servers=2, sync="tensor", delta=True, python=fake_python(folder, checksums=True))
    with engine(folder, **options | changes) as made:
        yield Trainer(made)


@pytest.fixture
def trainer(tmp_path) -> Iterator[Trainer]:
    torch.manual_seed(0)
    yield from started(tmp_path, tensor_parallel=2)


def test_changes_leave_the_bytes_of_whole_syncs_and_a_fault_at_any_place_loses_none(trainer, tmp_path):
    """One start for all: each part begins with both servers at the newest weights."""
    made = trainer.made
    written = (tmp_path / "servers/server-0.args").read_text().splitlines()
    assert written[written.index("--custom-weight-loader") + 1] == "dapo_mcore_delta.load"
    first = trainer.sync()
    assert "sync/delta_bytes" not in first and first["sync/snapshot_bytes"] == WHOLE
    for share in (0.02, 0, 1, 0.02):
        trainer.step(share)
        numbers = trainer.sync()
        trainer.assert_served()
        assert numbers["sync/changed_share"] == pytest.approx(share, abs=0.005)
        assert numbers["sync/bytes"] == WHOLE and shared_files() == []
    assert numbers["sync/delta_bytes"] < 0.15 * WHOLE

    def both_serve_after_a_whole_copy() -> None:
        trainer.assert_served(0)
        wait_for(lambda: states(made) == ["serving", "waiting"], otherwise=made.pool.states.describe)
        assert not trainer.step_and_sync(), "one server lacks the last weights, so all get everything"
        trainer.assert_served()
        assert trainer.step_and_sync(), "all hold the base again"
        trainer.assert_served()

    # a server refuses a bucket: its changes are not lost with it
    order(servers(made)[1], "status", where="/update_weights_from_tensor", value=400, after=1)
    assert trainer.step_and_sync()
    both_serve_after_a_whole_copy()
    # it is killed between two updates and restarted before the next
    os.killpg(processes(made)[1].pid, signal.SIGKILL)
    wait_for(lambda: states(made)[1] == "waiting")
    both_serve_after_a_whole_copy()
    # it dies in a bucket of changes
    order(servers(made)[1], "die", where="bucket 1")
    assert trainer.step_and_sync()
    both_serve_after_a_whole_copy()
    # a value in its memory has changed: the sums show it, and it ends rather than serve that
    order(servers(made)[1], "flip", where="weights")
    assert trainer.step_and_sync()
    assert len(made.pool.serving) == 2
    assert trainer.step_and_sync()
    assert "do not hold the trainer's weights" in (tmp_path / "servers/server-1.log").read_text()
    both_serve_after_a_whole_copy()
    # it reports another version than the base, as one that was restarted behind the run's back
    made.pool.servers[1].client.weight_version = lambda: _answer("default")
    assert trainer.step_and_sync()
    assert "changes are counted from" in made.pool.servers[1].problem
    del made.pool.servers[1].client.weight_version
    both_serve_after_a_whole_copy()
    # the stream breaks off: the snapshot is mixed, and nobody holds the base
    with pytest.raises(Exception, match="lacks 1 of"):
        made.update_weights(iter(list(trainer.weights.items())[:-1]), made.weight_version + 1)
    wait_for(lambda: states(made) == ["waiting", "waiting"])
    assert not trainer.step_and_sync()
    trainer.assert_served()
    assert shared_files() == []


async def _answer(value: str) -> str:
    return value


def test_changes_travel_by_broadcast_too_and_an_update_that_reaches_no_server_is_repeated_whole(tmp_path):
    """A broadcast breaks for its whole group if one server holds other values than it should."""
    torch.manual_seed(0)
    for trainer in started(tmp_path, sync="distributed", python=fake_python(tmp_path, "0.5.15", checksums=True)):
        trainer.sync()
        assert trainer.step_and_sync() and trainer.step_and_sync()
        trainer.assert_served()
        order(servers(trainer.made)[1], "flip", where="weights")
        assert trainer.step_and_sync()
        trainer.step()
        with pytest.raises(
            UpdateBroken, match=r"do not hold the trainer's weights .* set rollout\.sglang\.delta false"
        ):
            trainer.sync()
        wait_for(lambda t=trainer: states(t.made) == ["waiting", "waiting"])
        assert "sync/delta_bytes" not in trainer.sync()
        trainer.assert_served()
        assert trainer.step_and_sync()
        trainer.assert_served()


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"sync": "disk"}, "set sync tensor or distributed"),
        ({"sync": "tensor", "quantize": "fp8"}, "quantize fp8: .*set one of both off"),
        ({"sync": "tensor", "colocated": True}, "each sync sends all; set delta false"),
        ({"sync": "tensor", "urls": ["http://a:1"]}, "urls names 1 that run already; set num_servers instead"),
        ({"sync": "tensor", "server_args": {"custom_weight_loader": ["a.b"]}}, "leave one of both out"),
    ],
)
def test_settings_that_changes_do_not_go_with_are_refused(settings, remedy):
    with pytest.raises(ValueError, match=f"delta true does not go with .*{remedy}"):
        SGLangConfig.model_validate({**settings, "delta": True})
    SGLangConfig.model_validate({**settings, "delta": False})


def test_models_that_sglang_computes_on_load_and_too_little_memory_are_refused(monkeypatch):
    check_delta("Qwen3MoeForCausalLM", 2**20)
    with pytest.raises(ConfigError, match=r"does not go with DeepseekV3ForCausalLM: .*; set delta false"):
        check_delta("DeepseekV3ForCausalLM", 2**20)
    monkeypatch.setattr(delta.psutil, "virtual_memory", lambda: SimpleNamespace(available=3 * 2**30))
    with pytest.raises(ConfigError, match=r"host memory, 4.0 GiB, but 3.0 GiB are free"):
        check_delta("Qwen2ForCausalLM", 4 * 2**30)


def test_a_snapshot_copies_and_counts():
    snapshot = Snapshot()
    first, second = torch.ones(3, 5), torch.full((7,), 2.0, dtype=torch.bfloat16)
    snapshot.keep("a", first)
    snapshot.keep("b", second)
    first.zero_()
    assert snapshot.get("a", first).eq(1).all() and torch.equal(snapshot.get("b", second), second)
    snapshot.keep("a", first)
    assert snapshot.get("a", first).eq(0).all() and snapshot.num_bytes == 60 + 14
    assert snapshot.get("a", second) is None and snapshot.get("c", first) is None


class OnGpu:
    """Stands for a bf16 tensor on a GPU: what is done with it is written down."""

    shape, dtype, nbytes, is_cuda, device = torch.Size([300]), torch.bfloat16, 600, True, torch.device("cuda", 0)

    def __init__(self, done: list[str]):
        self.done = done

    def record_stream(self, stream: str) -> None:
        self.done.append(f"{stream} uses the tensor")


class HostCopy:
    """Stands for pinned memory: its parts have a shape and a dtype."""

    def __init__(self, done: list[str], nbytes: int):
        self.done, self.nbytes, self.shape, self.dtype = done, nbytes, OnGpu.shape, OnGpu.dtype

    def __getitem__(self, place: slice) -> HostCopy:
        self.done.append(f"{place.start} to {place.stop}")
        return self

    def view(self, _) -> HostCopy:
        return self

    def copy_(self, tensor: OnGpu, non_blocking: bool) -> None:
        self.done.append(f"copied, {non_blocking=}")


class FakeStream:
    def __init__(self, done: list[str], name: str):
        self.done, self.name = done, name

    def wait_stream(self, other: FakeStream) -> None:
        self.done.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.done.append(f"host waits for {self.name}")

    def __enter__(self) -> None:
        self.done.append(f"in {self.name}:")

    def __exit__(self, *_) -> None: ...

    def __str__(self) -> str:
        return self.name


def test_copies_of_weights_on_a_gpu_lie_in_pinned_slabs_and_leave_by_a_stream_of_their_own(monkeypatch):
    """On fakes: calls and their order. It shows no speed, and nothing about a real GPU."""
    done: list[str] = []

    def empty(size: int, dtype: torch.dtype, pin_memory: bool) -> HostCopy:
        done.append(f"slab of {size}, {pin_memory=}")
        return HostCopy(done, size)

    sender = DeltaSender(DistributedSender("127.0.0.1", "gloo", 1.0), bucket_bytes=1)
    snapshot = sender._snapshot = Snapshot(slab_bytes=1400)
    monkeypatch.setattr(delta.torch, "empty", empty)
    monkeypatch.setattr(delta.torch.cuda, "Stream", lambda device: FakeStream(done, "writing"))
    monkeypatch.setattr(delta.torch.cuda, "current_stream", lambda device: FakeStream(done, "main"))
    monkeypatch.setattr(delta.torch.cuda, "stream", lambda stream: stream)
    for name in ("a", "b", "a", "c"):
        snapshot.keep(name, OnGpu(done))
    snapshot.settle()
    copied = ["writing waits for main", "in writing:", "copied, non_blocking=True", "writing uses the tensor"]
    slab = "slab of 1400, pin_memory=True"
    places = [[slab, "0 to 600"], ["768 to 1368"], [], [slab, "0 to 600"]]
    assert done == [line for place in places for line in place + copied] + ["host waits for writing"]
    assert snapshot.num_bytes == 2800
    done.clear()
    for _ in sender._kept(iter([([("a", OnGpu(done))], False), ([("b", OnGpu(done))], True)])):
        done.append("sent")
    assert done == [*copied, "sent", "host waits for writing"] * 2, "a sender may use a bucket's memory again"


def test_changes_of_many_tensors_are_packed_into_few_buckets():
    """Each bucket of the stream holds one tensor. Its changes take far less, so many share a bucket."""
    sender = DeltaSender(DistributedSender("127.0.0.1", "gloo", 1.0), bucket_bytes=20_000)
    tensors = {f"w{i}": torch.randn(64, 64) for i in range(10)}
    old = {name: tensor.clone() for name, tensor in tensors.items()}
    list(sender.stage(stream(old), "0"))
    sender.finish("0")
    sender._pool = [SimpleNamespace(weight_version="0", state="serving")]
    for tensor in tensors.values():
        tensor[0, :10] = 1.0
    sent = list(sender.stage(stream(tensors), "1"))
    assert [last for _, last in sent] == [False] * (len(sent) - 1) + [True]
    assert len(sent) == 1 and sent[0][0][0][1].nbytes == sender.numbers["sync/delta_bytes"]
    assert sent[0][0][0][1].nbytes == 10 * (4 * 3 * 64 + 10 * 6 + 4)
    assert sender.numbers["sync/changed_share"] == 10 / 64**2


def stream(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[list[tuple[str, torch.Tensor]], bool]]:
    for number, pair in enumerate(tensors.items()):
        yield [pair], number == len(tensors) - 1
