"""Keeps the inputs of layers in host memory between the forward and the backward pass (`model.offload_activations`).

Change here: what is offloaded, and when it is copied. With full recomputation the input of a layer is all that autograd
saves for it; Megatron's own offloading (0.16.1 to 0.19.2) needs Transformer Engine's layers, and either no recomputation
and no pipeline, or hooks inside of each module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@dataclass
class LayerInput:
    """The saved input of one layer.

    host      its copy in host memory, pinned on a GPU
    copied    the event after the latest copy, out or back
    on_device the input itself: until the forward pass is one layer further, and from the copy back to its use
    before    the saved input of the layer before it in the same forward pass
    """

    host: Tensor
    copied: Any
    on_device: Tensor | None
    before: LayerInput | None


class LayerInputOffload:
    """Copies saved layer inputs to the host during the next layer's forward pass, and back during the backward pass of the
    layer after. At most two inputs per model chunk are on the device at a time, and in a forward pass the embedding's
    output, which Megatron holds until its end.

    All copies run one after the other on a side stream. So a copy back never overtakes the copy out, and nothing is written
    to a host buffer that is still read: PyTorch's pinned allocator hands a buffer out again only when copies from it are done.
    On a CPU the copies are real too, but save nothing.
    """

    def __init__(self, layers: Iterable[torch.nn.Module], device: torch.device):
        self._streams = torch.get_device_module(device)  # torch.cuda or torch.cpu
        self._side = self._streams.Stream()
        self._pinned = device.type == "cuda"
        self._is_recording = False
        self._address = 0
        self._newest: LayerInput | None = None  # of all forward passes: a pipeline stage has several in flight
        self._before: LayerInput | None = None
        for layer in layers:
            layer.register_forward_pre_hook(self._note_input, with_kwargs=True)
            for module in layer.modules():
                if hasattr(module, "token_dispatcher"):
                    module.register_forward_hook(_forget_graph)

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Offload the inputs of layers that run in the block with gradients."""
        self._is_recording, self._before = torch.is_grad_enabled(), None
        try:
            with saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            self._is_recording, self._before = False, None

    def _note_input(self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        # the pipeline schedule keeps what a stage has received, so a copy would save nothing
        self._address = hidden.data_ptr() if self._is_recording and not hidden.is_leaf else 0

    def _pack(self, tensor: Tensor) -> Tensor | LayerInput:
        """Return what autograd keeps: the LayerInput for the latest layer's input, and any other tensor itself."""
        if not self._address or tensor.data_ptr() != self._address:
            return tensor
        self._address = 0
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pinned)
        saved = LayerInput(host, self._copy(host, tensor), tensor, self._before)
        if self._newest is not None:
            self._release(self._newest)
        self._newest = self._before = saved
        return saved

    def _unpack(self, saved: Tensor | LayerInput) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        newest, self._newest = self._newest, None
        if newest is not None and newest is not saved:  # another micro-batch's
            self._release(newest)
        self._fetch(saved)
        if saved.before is not None:
            self._fetch(saved.before)  # beside this layer's backward pass
        tensor = saved.on_device
        self._release(saved)
        saved.before = None  # so that host buffers are free as soon as autograd drops them
        return tensor

    def _fetch(self, saved: LayerInput) -> None:
        """Begin to copy an input back if it is not on the device."""
        if saved.on_device is None:
            saved.on_device = torch.empty_like(saved.host, device=self._streams.current_device())
            saved.copied = self._copy(saved.on_device, saved.host)

    def _release(self, saved: LayerInput) -> None:
        """Let the current stream wait for the latest copy, so that it may use the input, or its memory for something else."""
        self._streams.current_stream().wait_event(saved.copied)
        saved.on_device = None

    def _copy(self, target: Tensor, source: Tensor) -> Any:
        """Begin a copy once the current stream has come here, and return the event after it."""
        self._side.wait_stream(self._streams.current_stream())
        with self._streams.stream(self._side):
            target.copy_(source, non_blocking=True)
        return self._side.record_event()


def _forget_graph(experts: torch.nn.Module, *_: Any) -> None:
    """Detach what a token dispatcher remembers of a finished forward pass (megatron-core 0.16.1 to 0.19.2: the router's
    probabilities). Their graph would hold the layer's input on the device until the layer runs again."""
    for name, value in vars(experts.token_dispatcher).items():
        if isinstance(value, Tensor):
            setattr(experts.token_dispatcher, name, value.detach())
