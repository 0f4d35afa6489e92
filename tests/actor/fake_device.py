"""A fake second device: the CPU's memory under another name. Mixing it with host tensors fails as on CUDA.

    with FakeDevice():
        …                # tensors made on DEVICE, moved there or computed from such say that they are there

`waits` collects the calls for which the host would wait until the device's queue is empty.
Every call of a torch function from Python is seen; what C++ calls by itself (autograd, DDP's hooks) is not, so its tensors
belong to neither side and go with both. Host tensors without dimensions go with both as well, as they do on CUDA.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("xpu", 0)  # a type that no code here treats specially, as it does cuda
HOST = torch.device("cpu")

_FACTORIES = {
    *("tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "linspace", "logspace", "rand", "randn"),
}
_ACROSS = {"copy_", "set_", "__get__", "__set__", "_make_subclass", "_has_compatible_shallow_copy_type"}
"""May take tensors of both sides."""
_NEED_VALUES = {
    *("item", "tolist", "nonzero", "argwhere", "bincount", "unique", "_unique2", "masked_select", "equal", "allclose"),
    *("__bool__", "__int__", "__float__", "__index__", "is_nonzero", "numpy"),
}
"""The host needs what the device has computed."""
_FROM_NUMBERS = {"tensor", "as_tensor", "new_tensor"}
"""Copy a number to the device and wait for the copy; `full` and `new_full` do not."""


class FakeDevice(TorchFunctionMode):
    """While entered, DEVICE exists, and a call that CUDA would refuse raises RuntimeError (or TypeError, as CUDA does)."""

    def __init__(self) -> None:
        super().__init__()
        self._sides: dict[int, tuple[torch.UntypedStorage, torch.device]] = {}
        self.waits: list[str] = []

    def __enter__(self) -> FakeDevice:
        self._from_numpy, torch.from_numpy = torch.from_numpy, self._tagged  # torch shows this function to no mode
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.from_numpy = self._from_numpy
        super().__exit__(*error)

    def _tagged(self, array: Any) -> torch.Tensor:
        tensor = self._from_numpy(array)
        self._put(tensor, HOST)
        return tensor

    def adopt(self, tensors: Iterable[torch.Tensor]) -> None:
        """Treat existing tensors as tensors on the device, as after `module.to(device)`."""
        for tensor in tensors:
            self._put(tensor, DEVICE)

    def side(self, tensor: torch.Tensor) -> torch.device | None:
        with torch._C.DisableTorchFunction():
            entry = self._sides.get(tensor.untyped_storage()._cdata)
        return entry[1] if entry else None

    def _put(self, tensor: torch.Tensor, side: torch.device) -> None:
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
            self._sides[storage._cdata] = (storage, side)  # kept alive, so that no other tensor gets its address

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if function == torch.Tensor.device.__get__:
            return self.side(tensors[0]) or function(*args, **kwargs)
        if name in ("to", "cpu"):
            return self._moved(tensors[0], name, [*args[1:], *kwargs.values()], kwargs.get("non_blocking", False))
        self._look_for_wait(name, args, kwargs)
        if name == "numpy" and self.side(tensors[0]) == DEVICE:
            raise TypeError("can't convert a device tensor to numpy; use Tensor.cpu() first")
        self._check(name, tensors)
        side = self._side_of_result(name, tensors, kwargs)
        if kwargs.get("device") == DEVICE:
            kwargs = kwargs | {"device": HOST}
        result = function(*args, **kwargs)
        if side is not None:
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor) and self.side(leaf) is None:
                    self._put(leaf, side)
        return result

    def _look_for_wait(self, name: str, args: Any, kwargs: Any) -> None:
        there = bool(args) and isinstance(args[0], torch.Tensor) and self.side(args[0]) == DEVICE
        index = args[1:] if name == "__getitem__" else ()
        waits = there and (name in _NEED_VALUES or any(getattr(i, "dtype", None) == torch.bool for i in index))
        if waits or (name in _FROM_NUMBERS and (there or kwargs.get("device") == DEVICE)):
            self.waits.append(f"{name} in {_caller()}")

    def _moved(self, tensor: torch.Tensor, name: str, given: list[Any], non_blocking: bool) -> torch.Tensor:
        """Perform `to` or `cpu`: return the tensor itself if it is there already, otherwise a copy on the other side."""
        dtypes = [value for value in given if isinstance(value, torch.dtype)]
        places = [torch.device(value) for value in given if isinstance(value, torch.device | str)]
        places += [self.side(value) for value in given if isinstance(value, torch.Tensor)]
        here = self.side(tensor)
        goal = HOST if name == "cpu" else places[0] if places else here
        if name == "to" and goal == HOST and not _called_by_the_project():
            goal = DEVICE
        result = tensor.to(*dtypes) if dtypes else tensor
        if goal != here:
            result = result.clone()
            if DEVICE in (goal, here) and not non_blocking:  # torch pins the copy of such a `to` the host
                self.waits.append(f"{name} in {_caller()}")
        if goal is not None:
            self._put(result, goal)
        return result

    def _check(self, name: str, tensors: list[torch.Tensor]) -> None:
        if name in _ACROSS or name.startswith("_foreach"):
            return
        with torch._C.DisableTorchFunction():
            sides = {self.side(tensor) for tensor in tensors if tensor.dim() or self.side(tensor) == DEVICE}
        index_from_host = name in ("__getitem__", "__setitem__") and self.side(tensors[0]) == DEVICE
        if {HOST, DEVICE} <= sides and not index_from_host:
            raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got {DEVICE} and {HOST}")

    def _side_of_result(self, name: str, tensors: list[torch.Tensor], kwargs: Any) -> torch.device | None:
        if kwargs.get("device") is not None:
            goal = torch.device(kwargs["device"])
            return goal if goal == DEVICE or _called_by_the_project() else None
        if name in _FACTORIES:
            return HOST if _called_by_the_project() else None
        sides = [self.side(tensor) for tensor in tensors]
        return DEVICE if DEVICE in sides else HOST if HOST in sides else None


def _caller() -> str:
    """Return the module whose code has called torch."""
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__", "").startswith(("torch", __name__)):
        frame = frame.f_back
    return frame.f_globals.get("__name__", "")


def _called_by_the_project() -> bool:
    """Megatron's `cuda` is the CPU here (actor/parallel/cpu_device.py), so only the project's own word for the host counts."""
    return _caller().startswith("dapo_mcore")
