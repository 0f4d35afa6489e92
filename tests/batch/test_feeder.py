"""Micro-batches on the device: order, values and the calls that a GPU needs. DALI is the real package, on a CPU.

Does not prove: that copies overlap on a GPU. The GPU here is fake: its copies are done when a stream waits for them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from dapo_mcore.batch.feeder import AHEAD, ALIGNMENT, DaliFeeder, PlainFeeder, build_feeder, check_feeder, pack, unpack
from dapo_mcore.errors import ConfigError
from dapo_mcore.types import MicroBatch

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
TORCH_UTILS = "nvidia.dali.plugin.pytorch.torch_utils"


def micro_batch(number: int, lengths: list[int], num_rows: int, **changes: Any) -> MicroBatch:
    """Return a micro-batch of made-up values, packed, with as many rows as said."""
    size, random = sum(lengths), torch.Generator().manual_seed(number)
    ids, values = (lambda n: torch.randint(99, (n,), generator=random)), lambda: torch.randn(num_rows, generator=random)
    return MicroBatch(
        tokens=ids(size)[None],
        position_ids=ids(size)[None],
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        lengths=np.array(lengths),
        rows=ids(num_rows),
        targets=ids(num_rows),
        advantages=values(),
        token_weights=values(),
        rollout_logprobs=values(),
        sample_ids=ids(num_rows),
    ).with_(**changes)


def ragged(count: int) -> list[MicroBatch]:
    """Return micro-batches of different shapes, among them one without rows, one not packed, and some with more fields."""
    made = [micro_batch(i, lengths=[3 + i, 2 * i + 1], num_rows=(5 * i) % 7) for i in range(count)]
    made[1:2] = [micro.with_(cu_seqlens=None) for micro in made[1:2]]
    made[2::3] = [micro.with_(old_logprobs=-micro.token_weights) for micro in made[2::3]]
    return made


def tensors_of(micro: MicroBatch) -> dict[str, torch.Tensor]:
    values = {name: getattr(micro, name) for name in MicroBatch.__dataclass_fields__}
    return {name: value for name, value in values.items() if torch.is_tensor(value)}


def assert_same(found: MicroBatch, expected: MicroBatch) -> None:
    """Bit for bit, shapes, dtypes and missing fields included."""
    assert tensors_of(found).keys() == tensors_of(expected).keys() and found.lengths is expected.lengths
    for name, tensor in tensors_of(expected).items():
        assert getattr(found, name).dtype == tensor.dtype and torch.equal(getattr(found, name), tensor), name


class LateCopies(TorchFunctionMode):
    """A GPU whose copies hold 255 in each byte until a stream waits for the event after them. Notes copies and waits in order."""

    def __init__(self) -> None:
        super().__init__()
        self.streams = [Stream(self, "compute")]
        self.pinned: list[torch.Tensor] = []
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.there: list[torch.Tensor] = []
        self.recorded: list[tuple[torch.Tensor, str]] = []
        self.log: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if function == torch.Tensor.device.__get__:
            return CUDA if shares_memory(args[0], self.there) else CPU
        if name == "pin_memory":
            self.pinned.append(args[0].clone())
            return self.pinned[-1]
        if name == "to":
            assert args[1:] == (CUDA,) and kwargs == {"non_blocking": True} and self.streams[-1].name == "side"
            assert shares_memory(args[0], self.pinned), "a copy from memory that is not pinned waits"
            self.there.append(torch.full_like(args[0], 255))
            self.copies.append((self.there[-1], args[0]))
            return self.there[-1]
        return function(*args, **kwargs)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.streams.append(stream)
        yield
        self.streams.pop()


class Stream:
    def __init__(self, gpu: LateCopies, name: str):
        self.gpu, self.name = gpu, name

    def record_event(self) -> int:
        self.gpu.log.append("copy")
        return len(self.gpu.copies)

    def wait_event(self, event: int) -> None:
        self.gpu.log.append(f"{self.name} waits for {event}")
        for target, source in self.gpu.copies[:event]:
            target.copy_(source)


def shares_memory(tensor: torch.Tensor, others: list[torch.Tensor]) -> bool:
    return tensor.untyped_storage().data_ptr() in {other.untyped_storage().data_ptr() for other in others}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[LateCopies]:
    fake = LateCopies()

    def record_stream(
        tensor: torch.Tensor, stream: Stream
    ) -> None:  # torch refuses a made-up stream before a mode sees it
        fake.recorded.append((tensor, stream.name))

    monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(fake, "side"))
    monkeypatch.setattr(torch.cuda, "stream", fake.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: fake.streams[-1])
    with fake:
        yield fake


def test_copies_run_ahead_of_use_and_are_waited_for(gpu: LateCopies):
    given, waits = ragged(5), []
    for number, micro in enumerate(PlainFeeder(CUDA)(given)):
        assert_same(micro, given[number])
        assert all(shares_memory(tensor, [gpu.there[number]]) for tensor in tensors_of(micro).values())
        # otherwise torch would give the memory to a later copy while the compute stream still reads it
        assert gpu.recorded[number][0] is gpu.there[number] and gpu.recorded[number][1] == "compute"
        assert all((target == 255).all() for target, _ in gpu.copies[number + 1 :]), "nothing waits for the next copies"
        waits.append(f"compute waits for {number + 1}")
    assert gpu.log == ["copy", "copy", "copy", waits[0], "copy", waits[1], "copy", *waits[2:]] and AHEAD == 2


def test_what_is_on_the_gpu_is_not_copied(gpu: LateCopies):
    scores = torch.ones(4)
    gpu.there.append(scores)
    (micro,) = PlainFeeder(CUDA)([micro_batch(0, [4], 4, old_logprobs=scores)])
    assert micro.old_logprobs is scores and not shares_memory(micro.targets, [scores])


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5])
def test_on_a_cpu_the_micro_batches_are_passed_on_in_order(count):
    given = ragged(count)
    found = list(PlainFeeder(CPU)(given))
    assert len(found) == count and all(a is b for a, b in zip(found, given, strict=True))


def test_on_another_device_a_micro_batch_is_copied():
    batch = micro_batch(0, [1, 1], 2)
    (moved,) = PlainFeeder(torch.device("meta"))([batch])
    assert {tensor.device.type for tensor in tensors_of(moved).values()} == {"meta"}
    assert tensors_of(moved).keys() == tensors_of(batch).keys() and moved.lengths is batch.lengths
    assert batch.tokens.device == CPU


def test_packed_tensors_are_aligned_and_come_back():
    for micro in ragged(5):
        flat = torch.from_numpy(pack(micro))
        assert_same(unpack(flat, micro), micro)
        offsets = [tensor.storage_offset() * tensor.itemsize for tensor in tensors_of(unpack(flat, micro)).values()]
        assert all(offset % ALIGNMENT == 0 for offset in offsets) and flat.nbytes % ALIGNMENT == 0


@pytest.fixture
def dali() -> None:
    pytest.importorskip("nvidia.dali", reason="needs the extra dali")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_dali_gives_the_same_batches_at_every_depth_and_to_the_end_of_every_list(dali, depth, threads):
    feed = DaliFeeder(CPU, depth=depth, threads=threads)
    for count in (0, 1, 2, 3, 5, 8):
        given = ragged(count)
        found = list(feed(given))  # compared only when all are there: an output that DALI reuses would have changed
        assert len(found) == count
        for a, b in zip(found, given, strict=True):
            assert_same(a, b)
            assert a.tokens.data_ptr() != b.tokens.data_ptr()


def test_dali_feeds_several_lists_in_turn_and_anew_after_one_was_left(dali):
    feed, first, second = DaliFeeder(CPU), ragged(5), ragged(7)[2:]
    left = feed(second)
    next(left)
    for a, b in zip(chain.from_iterable(zip(feed(first), feed(second))), chain.from_iterable(zip(first, second))):
        assert_same(a, b)
    left.close()
    assert_same(next(feed(first)), first[0])


class MadeUpPipeline:
    """DALI's pipeline with one external source of two outputs, without a GPU. Notes how it is made and run."""

    def __init__(self, batch_size: int, num_threads: int, device_id: int | None, *, prefetch_queue_depth: int):
        self.made = (batch_size, num_threads, device_id, prefetch_queue_depth)
        self.streams: list[Any] = []
        MADE.append(self)

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...

    def set_outputs(self, *nodes: Any) -> None:
        self.nodes = nodes

    def run(self, stream: Any) -> list[list[Any]]:
        self.streams.append(stream)
        values = self.nodes[0].source(SimpleNamespace(iteration=len(self.streams) - 1))
        return [[value] for value in values]


MADE: list[MadeUpPipeline] = []


def test_on_a_gpu_dali_copies_the_tensors_and_gives_them_to_the_current_stream(monkeypatch: pytest.MonkeyPatch):
    def node(source: Any, place: str = "cpu") -> SimpleNamespace:
        return SimpleNamespace(source=source, place=place, gpu=lambda: node(source, "gpu"))

    sources = SimpleNamespace(external_source=lambda source, num_outputs, batch: [node(source)] * num_outputs)
    copies = SimpleNamespace(to_torch_tensor=lambda value, copy: torch.from_numpy(value.copy() if copy else value))
    modules = {"nvidia": None, "nvidia.dali": SimpleNamespace(Pipeline=MadeUpPipeline, fn=sources), TORCH_UTILS: copies}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module or SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    for found, given in zip(DaliFeeder(torch.device("cuda", 3))(ragged(3)), ragged(3), strict=True):
        assert_same(found.with_(lengths=given.lengths), given)
    (pipeline,) = MADE
    assert pipeline.made == (1, 1, 3, AHEAD) and [node.place for node in pipeline.nodes] == ["cpu", "gpu"]
    assert pipeline.streams == ["stream of cuda:3"] * 3


def test_a_feeder_is_built_as_the_configuration_says(monkeypatch: pytest.MonkeyPatch):
    assert isinstance(build_feeder("plain", CPU), PlainFeeder)
    for name in ("nvidia", TORCH_UTILS):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    assert isinstance(build_feeder("dali", CPU), DaliFeeder)
    monkeypatch.setitem(sys.modules, TORCH_UTILS, None)  # as if it were not installed
    check_feeder("plain")
    with pytest.raises(
        ConfigError, match=r"feeder dali needs NVIDIA DALI.*pip install -e '\.\[dali\]', or use .*plain"
    ):
        build_feeder("dali", CPU)
