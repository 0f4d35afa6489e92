"""Lets megatron-core (0.16.1 to 0.19.2) run on CPU and gloo: its modules get a `torch` whose CUDA functions use the CPU.

Change here: when a new megatron-core version calls further CUDA functions. Only active without a CUDA device. The global
`torch` stays unchanged, except `Tensor.cuda` and `Tensor.type`, which behave differently for callers in megatron.core only.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

_CPU = torch.device("cpu")
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like")
_CUDA_TYPE_NAMES = {f"torch.{kind}": f"torch.cuda.{kind}" for kind in ("FloatTensor", "HalfTensor", "BFloat16Tensor")}

# megatron.core imports these inside functions; they must exist before their `torch` is replaced
_LAZY_MODULES = (
    "dist_checkpointing",
    "dist_checkpointing.exchange_utils",
    "dist_checkpointing.strategies.async_utils",
    "dist_checkpointing.strategies.filesystem_async",
    "dist_checkpointing.strategies.fully_parallel",
    "dist_checkpointing.strategies.state_dict_saver",
    "dist_checkpointing.strategies.torch",
    "distributed",
    "models.gpt",
    "optimizer.clip_grads",
    "optimizer.distrib_optimizer",
    "optimizer_param_scheduler",
    "pipeline_parallel.schedules",
    "rerun_state_machine",
    "tensor_parallel.random",
    "transformer.moe.moe_layer",
    "transformer.moe.token_dispatcher",
)


def install_if_needed() -> None:
    """Let megatron.core run on the CPU if there is no CUDA device. Idempotent; call it before any Megatron object is built."""
    if torch.cuda.is_available() or getattr(torch.Tensor, "_megatron_on_cpu", False):
        return
    for name in _LAZY_MODULES:
        importlib.import_module(f"megatron.core.{name}")
    stand_in = _torch_stand_in()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = stand_in
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].config.disable = True  # if megatron.core was imported before dapo_mcore.actor
    _redirect_rng_tracker()
    _keep_moe_splits_on_cpu()
    _scope_tensor_methods()
    torch.Tensor._megatron_on_cpu = True


class _Module(types.ModuleType):
    """A module with some names replaced. All other names come from the real module."""

    def __init__(self, real: types.ModuleType, **replaced: Any):
        super().__init__(real.__name__)
        self.__dict__.update(replaced, _real=real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class _Stream:
    """A CUDA stream or event that is always complete."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def _nothing(self, *_: Any) -> None:
        pass

    wait = wait_stream = wait_event = synchronize = _nothing

    def record(self, *_: Any) -> _Stream:
        return self

    record_event = record

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    __hash__ = object.__hash__


def _torch_stand_in() -> _Module:
    def nothing(*_: Any, **__: Any) -> None:
        return None

    stream = _Stream()
    cuda = _Module(
        torch.cuda,
        current_device=lambda: _CPU,
        current_stream=lambda *_: stream,
        default_stream=lambda *_: stream,
        stream=lambda _: contextlib.nullcontext(),
        get_rng_state=lambda *_, **__: torch.get_rng_state(),
        set_rng_state=lambda state, *_, **__: torch.set_rng_state(state),
        manual_seed=torch.manual_seed,
        is_current_stream_capturing=lambda: False,
        synchronize=nothing,
        empty_cache=nothing,
        set_device=nothing,
        Stream=_Stream,
        Event=_Stream,
        nvtx=types.SimpleNamespace(range_push=nothing, range_pop=nothing),
    )
    distributed = _Module(torch.distributed, all_gather=_all_gather, reduce_scatter=_reduce_scatter)
    factories = {name: _cpu_factory(getattr(torch, name)) for name in _FACTORIES}
    return _Module(torch, cuda=cuda, distributed=distributed, **factories)


def _all_gather(parts: list[torch.Tensor], own: torch.Tensor, group: Any = None) -> None:
    """Gather as torch does, but also parts of unequal lengths (expert-tensor-parallel ranks have them), which gloo refuses."""
    if len({part.shape for part in parts}) == 1:
        torch.distributed.all_gather(parts, own, group=group)
        return
    for part in parts:
        part.zero_()
    parts[group.rank()].copy_(own)
    for part in parts:
        torch.distributed.all_reduce(part, group=group)


def _reduce_scatter(own: torch.Tensor, parts: list[torch.Tensor], group: Any = None) -> None:
    """Write this rank's part of the sum over ranks into `own`. Parts may have unequal lengths."""
    whole = torch.cat(parts)
    torch.distributed.all_reduce(whole, group=group)
    own.copy_(whole.split([len(part) for part in parts])[group.rank()])


def _cpu_factory(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return `factory` with device="cuda" replaced by the CPU, and without pinned memory."""

    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def _redirect_rng_tracker() -> None:
    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


def _keep_moe_splits_on_cpu() -> None:
    """Convert all-to-all splits to lists; upstream does so only if they are on a GPU."""
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    dispatcher.maybe_move_tensor_to_cpu = to_host


def _scope_tensor_methods() -> None:
    real_type, real_cuda = torch.Tensor.type, torch.Tensor.cuda

    def called_by_megatron() -> bool:
        return sys._getframe(2).f_globals.get("__name__", "").startswith("megatron.core")

    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = real_type(self, *args, **kwargs)
        asks_for_name = not args and not kwargs
        return _CUDA_TYPE_NAMES.get(result, result) if asks_for_name and called_by_megatron() else result

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if called_by_megatron() else real_cuda(self, *args, **kwargs)

    torch.Tensor.type, torch.Tensor.cuda = tensor_type, cuda
