"""Micro-batches on the device, copied there ahead of their use.

Change here: how far ahead micro-batches are copied, and by which means. A feeder changes no value, dtype or order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch

from dapo_mcore.batch.context import round_up
from dapo_mcore.errors import ConfigError
from dapo_mcore.types import MicroBatch

AHEAD = 2
"""Micro-batches that may be on their way while another computes. One of 22,528 tokens has 1.2 MB."""

ALIGNMENT = 512
"""Bytes, as torch aligns every tensor: kernels are faster, or compiled otherwise, where pointers are aligned."""


class Feeder(Protocol):
    def __call__(self, micro_batches: Sequence[MicroBatch]) -> Iterator[MicroBatch]:
        """Yield the micro-batches in order with every tensor on the device, ready for the current stream.

        Calls are independent: several iterators may be read in turn, and one may be left before its end.
        """
        ...


def build_feeder(kind: Literal["plain", "dali"], device: torch.device) -> Feeder:
    """Return the feeder of batch.feeder. Raise ConfigError as `check_feeder` does."""
    check_feeder(kind)
    return DaliFeeder(device) if kind == "dali" else PlainFeeder(device)


def check_feeder(kind: Literal["plain", "dali"]) -> None:
    """Raise ConfigError if batch.feeder needs a package that cannot be imported."""
    if kind == "plain":
        return
    try:
        import nvidia.dali.plugin.pytorch.torch_utils  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"batch.feeder dali needs NVIDIA DALI, but its import fails ({error}); pip install -e '.[dali]', or use "
            "batch.feeder plain, which gives the same batches"
        ) from error


class PlainFeeder:
    """Copies micro-batches to a GPU through pinned memory on a stream of its own; on a CPU it passes them on."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, micro_batches: Sequence[MicroBatch]) -> Iterator[MicroBatch]:
        under_way: deque[Callable[[], MicroBatch]] = deque()
        for micro in micro_batches:
            under_way.append(self._start(micro))
            if len(under_way) > AHEAD:
                yield under_way.popleft()()
        yield from (finish() for finish in under_way)

    def _start(self, micro: MicroBatch) -> Callable[[], MicroBatch]:
        """Start the copy, and return what ends it."""
        if self.device.type == "cpu":
            return lambda: micro
        flat = torch.from_numpy(pack(micro))
        if self.stream is None:
            moved = flat.to(self.device, non_blocking=True)
            return lambda: unpack(moved, micro)
        with torch.cuda.stream(self.stream):
            # torch reuses pinned memory only after its copies
            moved = flat.pin_memory().to(self.device, non_blocking=True)
            return partial(self._finish, moved, self.stream.record_event(), micro)

    def _finish(self, moved: torch.Tensor, copied: torch.cuda.Event, micro: MicroBatch) -> MicroBatch:
        """Return the micro-batch for the current stream, which waits for the copy and then keeps the memory until it is done."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copied)
        moved.record_stream(current)
        return unpack(moved, micro)


class DaliFeeder:
    """Copies micro-batches by NVIDIA DALI's prefetching external source, to a GPU if the device is one, else on the CPU."""

    def __init__(self, device: torch.device, *, depth: int = AHEAD, threads: int = 1):
        self.device, self.depth, self.threads = device, depth, threads
        self.on_gpu = device.type == "cuda"

    def __call__(self, micro_batches: Sequence[MicroBatch]) -> Iterator[MicroBatch]:
        from nvidia.dali.plugin.pytorch.torch_utils import to_torch_tensor

        pipeline = self._pipeline(micro_batches)
        for expected, micro in enumerate(micro_batches):
            number, flat = pipeline.run(torch.cuda.current_stream(self.device) if self.on_gpu else None)
            assert int(np.asarray(number[0])) == expected, "DALI has skipped or repeated a micro-batch"
            yield unpack(to_torch_tensor(flat[0], copy=True), micro)  # DALI reuses the memory of its outputs

    def _pipeline(self, micro_batches: Sequence[MicroBatch]) -> Any:
        """Return a pipeline that runs once per micro-batch and gives its number and its packed tensors.

        Each call has its own: the source of one that goes on would have run ahead past the end of its list.
        """
        from nvidia.dali import Pipeline, fn

        def source(sample: Any) -> tuple[np.ndarray, np.ndarray]:
            if sample.iteration >= len(micro_batches):
                raise StopIteration
            return np.array(sample.iteration), pack(micro_batches[sample.iteration])

        pipeline = Pipeline(
            1, self.threads, self.device.index if self.on_gpu else None, prefetch_queue_depth=self.depth
        )
        with pipeline:
            number, flat = fn.external_source(source, num_outputs=2, batch=False)
            pipeline.set_outputs(number, flat.gpu() if self.on_gpu else flat)
        return pipeline


def pack(micro: MicroBatch) -> np.ndarray:
    """Return the bytes of all its tensors that are on the host, uint8, so that one copy takes them all."""
    tensors = _on_host(micro).values()
    flat = np.empty(sum(_room(tensor) for tensor in tensors), np.uint8)
    begin = 0
    for tensor in tensors:
        flat[begin : begin + tensor.nbytes] = tensor.numpy().reshape(-1).view(np.uint8)
        begin += _room(tensor)
    return flat


def unpack(flat: torch.Tensor, micro: MicroBatch) -> MicroBatch:
    """Return the micro-batch with its tensors that are on the host replaced by views of `flat`, a copy of `pack(micro)`."""
    views, begin = {}, 0
    for name, tensor in _on_host(micro).items():
        views[name] = flat[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        begin += _room(tensor)
    return micro.with_(**views)


def _on_host(micro: MicroBatch) -> dict[str, torch.Tensor]:
    values = {name: getattr(micro, name) for name in MicroBatch.__dataclass_fields__}
    return {name: value for name, value in values.items() if torch.is_tensor(value) and value.device.type == "cpu"}


def _room(tensor: torch.Tensor) -> int:
    return round_up(tensor.nbytes, ALIGNMENT)
