"""How the fake server takes weights: from safetensors, by a broadcast, and from shared memory."""

from __future__ import annotations

import base64
import io
import pickle
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any


def load(file: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    try:
        return load_file(file)
    except (TypeError, AttributeError, KeyError):  # numpy has neither bfloat16 nor float8
        from safetensors.torch import load_file

        return load_file(file)


def raw_bytes(tensor: Any) -> bytes:
    import torch

    return torch.as_tensor(tensor).contiguous().view(torch.uint8).numpy().tobytes()


def join_group(body: dict[str, Any]) -> Any:
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as c10d

    name, size, timeout = body["group_name"], body["world_size"], timedelta(minutes=30)
    store = dist.TCPStore(body["master_address"], body["master_port"], size, is_master=False)
    prefixed = c10d.PrefixStore(name, store)
    group, _ = c10d._new_process_group_helper(
        size, body["rank_offset"], [], c10d.Backend(body["backend"]), prefixed, group_name=name, timeout=timeout
    )
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
    return group


def destroy_group(group: Any) -> None:
    import torch.distributed as dist

    dist.destroy_process_group(group)


def receive(group: Any, body: dict[str, Any]) -> dict[str, Any]:
    import torch

    tensors = {
        name: torch.empty(shape, dtype=getattr(torch, dtype))
        for name, dtype, shape in zip(body["names"], body["dtypes"], body["shapes"])
    }
    for work in [group.broadcast(tensor, 0) for tensor in tensors.values()]:
        work.wait()
    return tensors


class Unpickler(pickle.Unpickler):
    """Admits the names that a bucket may use, as SGLang's unpickler does."""

    def find_class(self, module: str, name: str) -> Any:
        rebuilding = {"storage_filename", "typed_storage", "tensor", "cuda_tensor"}
        admitted = {("torch.multiprocessing.reductions", f"rebuild_{what}") for what in rebuilding}
        admitted |= {("torch", "Tensor"), ("torch", "Size"), ("types", "SimpleNamespace")}
        admitted |= {("torch.storage", kind) for kind in ("UntypedStorage", "TypedStorage")}
        admitted |= {("torch", dtype) for dtype in ("uint8", "float32", "bfloat16", "float8_e4m3fn")}
        if (module, name) not in admitted:
            raise RuntimeError(f"Blocked unsafe global ({module}.{name}) during pickle deserialization")
        return super().find_class(module, name)


def unpickled(handle: str) -> Any:
    return Unpickler(io.BytesIO(base64.b64decode(handle, validate=True))).load()


def load_pairs(weights: dict[str, Any], pairs: Iterable[tuple[str, Any]]) -> None:
    """Copy tensors into the weights of the same names, as a loader of SGLang does. New ones begin with other values."""
    import torch

    for name, tensor in pairs:
        held = weights.get(name)
        if not isinstance(held, torch.Tensor) or (held.shape, held.dtype) != (tensor.shape, tensor.dtype):
            held = weights[name] = torch.ones(tensor.shape, dtype=tensor.dtype)
        held.copy_(tensor)


def load_delta(model: Any, named_tensors: list[Any]) -> None:
    from dapo_mcore.rollout.sglang.server_side.dapo_mcore_delta import load

    load(model, named_tensors)


def views(handle: str) -> dict[str, Any]:
    """Return the tensors of a bucket where they lie in shared memory."""
    content = unpickled(handle)
    flat = content["flattened_tensor"]
    return {m.name: flat[m.start_idx : m.end_idx].view(m.dtype).reshape(m.shape) for m in content["metadata"]}


def opened(handle: str) -> dict[str, Any]:
    """Return copies of a bucket's tensors, as a server takes them."""
    return {name: tensor.cpu().clone() for name, tensor in views(handle).items()}
