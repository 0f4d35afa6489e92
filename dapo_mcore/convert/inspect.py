"""Describes the contents of a model folder as text.

Change here: what is described.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from dapo_mcore.architecture.mapping import parameters
from dapo_mcore.architecture.shape import WeightShape
from dapo_mcore.convert.convert import Reader, open_model
from dapo_mcore.model_files.megatron_folder import MegatronReader


def describe(folder: Path, *, every_tensor: bool = False) -> str:
    """Return the folder's kind, sizes, parameters and files; with `every_tensor` one line per tensor.

    Raises CheckpointError or ConfigError for a folder that is not whole and consistent.
    """
    reader, shape = open_model(folder)
    names = [name for parameter in parameters(shape) for name in parameter.hf]
    counts = {name: torch.Size(reader.shape(name)).numel() for name in names}
    dtypes = Counter(str(reader.dtype(name)).removeprefix("torch.") for name in names)
    lines = [
        f"{folder}: {_kind(reader)}",
        f"{shape.architecture}: {_sizes(shape)}",
        f"{sum(counts.values()):,} parameters in {len(names)} tensors, {', '.join(dtypes)}",
        *_files(reader),
    ]
    if every_tensor:
        lines += [f"  {name}  {list(reader.shape(name))}" for name in names]
    return "\n".join(lines)


def _kind(reader: Reader) -> str:
    return "a Megatron distributed checkpoint" if isinstance(reader, MegatronReader) else "a Hugging Face folder"


def _sizes(shape: WeightShape) -> str:
    text = (
        f"{shape.num_layers} layers, hidden {shape.hidden_size}, {shape.num_heads} heads over {shape.num_kv_heads} key-value "
        f"heads of {shape.head_dim}, vocabulary {shape.vocab_size}{' (tied)' if shape.tied else ''}"
    )
    if not shape.num_experts:
        return f"{text}, MLP {shape.ffn_size}"
    shared = f" and a shared one of {shape.shared_ffn}" if shape.shared_ffn else ""
    return f"{text}, {shape.num_experts} experts of {shape.expert_ffn}{shared} in {sum(shape.moe_layers)} layers"


def _files(reader: Reader) -> list[str]:
    if isinstance(reader, MegatronReader):
        paths = reader.store.paths
        cuts = max(map(reader.store.num_parts, reader.store.tensors))
        extra = f"; its most divided tensor lies in {cuts} chunks"
    else:
        paths, extra = reader.paths, ""
    total = sum(path.stat().st_size for path in paths)
    return [f"{len(paths)} file{'s' * (len(paths) > 1)}, {total / 1e9:.3f} GB{extra}"]
