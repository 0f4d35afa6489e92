"""Inputs of layers on the host: gradients stay the same, also if every copy ends as late as the streams allow.

The late streams are made up. That pinned buffers are not handed out too early is PyTorch's part, and no test here shows a
GPU's memory or speed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dapo_mcore.actor.model import offload
from dapo_mcore.actor.model.policy import build_policy
from tests.actor import families
from tests.actor.parity import Mesh, make_config

TOKENS, LAYERS = 24, 6
FULL = {"model__recompute": "full"}
OFFLOADED = FULL | {"model__offload_activations": True}


@pytest.mark.parametrize("family", ["qwen2", "qwen2-moe", "deepseek-v3"])
def test_gradients_are_the_same_and_two_layer_inputs_stay_on_the_device(alone, family):
    """Both with one forward pass in flight and with two, as in a pipeline's first stage."""
    model, inputs = build(alone, family, **FULL), build(alone, family, **OFFLOADED)
    for in_flight in (1, 2):
        kept, less = LayerInputs(model), LayerInputs(inputs)
        expected, found = gradients(model, in_flight), gradients(inputs, in_flight)
        assert len(expected) > 10 and all(torch.equal(found[name], expected[name]) for name in expected)
        assert kept.most == LAYERS * in_flight
        assert less.most == 3, "two, and the embedding's output during a forward pass"


def test_a_stage_s_received_input_stays_because_the_schedule_holds_it(alone):
    model = build(alone, "qwen2", **OFFLOADED)
    packed: list[Any] = []
    pack = model.offload._pack
    model.offload._pack = lambda tensor: packed.append(pack(tensor)) or packed[-1]
    received = torch.randn(TOKENS, 1, 64, requires_grad=True)
    model.pre_process = model.decoder.pre_process = False
    model.set_input_tensor(received)
    model(torch.zeros(1, TOKENS, dtype=torch.int64), torch.arange(TOKENS)[None], None)
    assert sum(isinstance(kept, offload.LayerInput) for kept in packed) == LAYERS - 1


@pytest.mark.parametrize("waits", [True, False])
def test_copies_that_end_late_change_nothing_because_the_computation_waits_for_them(alone, monkeypatch, waits):
    """Without the waits the gradients are NaN, so the first case shows something."""
    plain = build(alone, "qwen2", **FULL)
    expected = gradients(plain, 1), gradients(plain, 2)
    streams = LateStreams(waits)
    monkeypatch.setattr(torch, "get_device_module", lambda device: streams)
    monkeypatch.setattr(torch.Tensor, "copy_", streams.copy)
    model = build(alone, "qwen2", **OFFLOADED)
    found = gradients(model, 1), gradients(model, 2)
    # of one pass, the last layer's input need not come back: it is used before it has left
    assert streams.num_copies == (2 * LAYERS - 1) + 2 * 2 * LAYERS
    for one, other in zip(found, expected, strict=True):
        assert torch.isnan(one["decoder.layers.0.mlp.linear_fc1.weight"]).any() != waits
        assert not waits or all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_gradients_are_the_same_and_layer_inputs_leave_its_memory() -> None:
    plain, least = product_of_layers(torch.device("cuda"), offloads=False)
    for _ in range(3):
        gradients, peak = product_of_layers(torch.device("cuda"), offloads=True)
        assert all(torch.equal(found, expected) for found, expected in zip(gradients, plain, strict=True))
        assert least - peak >= 12 * 2**25, "of 16 inputs of 32 MiB"


def product_of_layers(device: torch.device, offloads: bool) -> tuple[list[torch.Tensor], int]:
    """Return the gradients of 16 recomputed layers, and on a GPU the peak of memory above what was allocated before."""
    torch.manual_seed(0)
    layers = [Product().to(device) for _ in range(16)]
    kept = offload.LayerInputOffload(layers, device)
    first = torch.randn(2**15, 256, device=device, requires_grad=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    with kept.forward_pass() if offloads else nullcontext():
        hidden = first * 1
        for layer in layers:
            hidden = checkpoint(lambda x, layer=layer: layer(hidden_states=x), hidden, use_reentrant=True)
    hidden.square().mean().backward()
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return [layer.weight.grad for layer in layers], peak - before


class Product(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(256, 256) / 16)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states @ self.weight


def build(layout: Any, family: str, **overrides: Any) -> Any:
    """Return a model with fixed weights."""
    config = families.hf_config(family)
    config.num_hidden_layers = LAYERS
    (model,) = build_policy(make_config(Mesh(), **overrides), config, layout)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1, generator=noise)
    return model


def gradients(model: Any, in_flight: int) -> dict[str, torch.Tensor]:
    """Return the gradients of so many forward passes, followed by their backward passes."""
    noise = torch.Generator().manual_seed(1)
    model.zero_grad()
    tokens = [torch.randint(families.VOCAB, (1, TOKENS), generator=noise) for _ in range(in_flight)]
    for hidden in [model(row, torch.arange(TOKENS)[None], None) for row in tokens]:
        (hidden * torch.randn(hidden.shape, generator=noise)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class LayerInputs:
    """The largest number of layer inputs that had memory at the start of a layer, in forward and backward passes."""

    def __init__(self, model: Any):
        self.most, self.storages = 0, []
        for layer in model.decoder.layers:
            layer.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, layer: Any, args: Any, kwargs: Any) -> None:
        self.storages.append(weakref.ref(kwargs["hidden_states"].untyped_storage()))
        self.most = max(self.most, len({s.data_ptr() for ref in self.storages if (s := ref()) is not None}))


class Stream:
    """A stream whose copies happen only when the computation waits for an event after them."""

    def __init__(self, streams: LateStreams):
        self.streams, self.copies, self.follows = streams, [], False

    def wait_stream(self, other: Stream) -> None:
        self.follows = other is self.streams.computing

    def record_event(self) -> tuple[list[Any], int]:
        return self.copies, len(self.copies)

    def wait_event(self, event: tuple[list[Any], int]) -> None:
        copies, count = event
        for index in range(count if self.streams.waits else 0):
            copies[index]()
            copies[index] = lambda: None


class LateStreams:
    """Stands in for torch.cuda. The target of a copy is NaN until then, and for ever if the source is gone by then."""

    def __init__(self, waits: bool):
        self.waits, self.num_copies = waits, 0
        self.current = self.computing = Stream(self)
        self.real_copy = torch.Tensor.copy_
        self.copy = lambda target, source, non_blocking=False: self._copy(target, source)

    def Stream(self) -> Stream:
        return Stream(self)

    def current_stream(self) -> Stream:
        return self.current

    def current_device(self) -> str:
        return "cpu"

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.current = stream
        yield
        self.current = self.computing

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        if self.current is self.computing:
            return self.real_copy(target, source)
        assert self.current.follows, "the copy may begin before its source is computed, or its target's memory is free"
        self.current.follows, self.num_copies = False, self.num_copies + 1
        memory, layout = weakref.ref(source.untyped_storage()), (source.storage_offset(), source.shape, source.stride())

        def late() -> None:
            if (storage := memory()) is not None:
                self.real_copy(target, torch.empty(0).set_(storage, *layout))

        self.current.copies.append(late)
        return target.fill_(torch.nan)
