"""Whether the tensors of a model folder are those of the model: their names, shapes and types, and finite values.

Change here: what makes stored tensors unusable. Names, shapes and types are told from headers, without reading data.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dapo_mcore.architecture.families import EMBEDDING, OUTPUT
from dapo_mcore.architecture.mapping import WeightReader, check_shapes, parameters
from dapo_mcore.architecture.shape import WeightShape
from dapo_mcore.errors import CheckpointError

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REBUILT = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")
"""Ends of names of buffers that old checkpoints carry and every model makes anew."""


class StoredReader(WeightReader, Protocol):
    """A reader of the tensors in a folder, which also knows their names and types."""

    folder: Path

    @property
    def names(self) -> Sequence[str]: ...

    def dtype(self, name: str) -> torch.dtype: ...


def check_tensors(reader: StoredReader, shape: WeightShape, num_mtp_layers: int = 0) -> None:
    """Raise CheckpointError for missing, unexpected, misshapen or quantized tensors. Reads no data.

    num_mtp_layers  multi-token-prediction layers after the model's own; transformers ignores their tensors, too.
    """
    _refuse_strangers(reader, shape, num_mtp_layers)
    for parameter in parameters(shape):
        check_shapes(parameter, reader, shape)
        for name in parameter.hf:
            if (dtype := reader.dtype(name)) not in WEIGHT_DTYPES:
                raise CheckpointError(
                    f"{reader.folder}: {name} is {str(dtype).removeprefix('torch.')}, but weights must be float32, bfloat16 "
                    f"or float16; give the model's unquantized weights"
                )


def check_tied(reader: StoredReader, shape: WeightShape) -> None:
    """Raise CheckpointError for a stored output head that is not the embedding: transformers would not tie them.

    Reads both where the folder of a tied model holds a head at all.
    """
    head, embedding = OUTPUT.hf[0], EMBEDDING.hf[0]
    if shape.tied and head in reader.names and not torch.equal(reader.read(head), reader.read(embedding)):
        raise CheckpointError(
            f"{head} differs from {embedding}, but config.json says tie_word_embeddings true; set it false, or remove one"
        )


class FiniteReader:
    """Another reader whose values are looked at as they are read: NaN and inf are refused by the tensor's name."""

    def __init__(self, reader: WeightReader):
        self._reader = reader

    def shape(self, name: str) -> tuple[int, ...]:
        return self._reader.shape(name)

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """The tensor or its slice, as WeightReader says. Raises CheckpointError for a value that is not finite."""
        tensor = self._reader.read(name, dim, start, stop)
        # the sum of a slice without NaN or inf is finite unless it overflows: only then is every value looked at
        if not tensor.sum(dtype=torch.float32).isfinite() and (wrong := int((~tensor.isfinite()).sum())):
            raise CheckpointError(
                f"{name} holds {wrong} values that are NaN or infinite, of {tensor.numel()} read; the weights come from a "
                f"diverged run or a damaged file: take an earlier checkpoint, or fetch the folder again"
            )
        return tensor


def _refuse_strangers(reader: StoredReader, shape: WeightShape, num_mtp_layers: int) -> None:
    """Raise CheckpointError for tensors that the model does not have."""
    known = {name for parameter in parameters(shape) for name in parameter.hf}
    extra = {name for name in reader.names if name not in known and not _is_ignored(name, shape, num_mtp_layers)}
    if extra:
        raise CheckpointError(
            f"{reader.folder} holds {len(extra)} tensors that {shape.architecture} has not, such as {min(extra)}; "
            f"config.json and weights belong to different models"
        )


def _is_ignored(name: str, shape: WeightShape, num_mtp_layers: int) -> bool:
    if name.endswith(REBUILT) or (shape.tied and name == OUTPUT.hf[0]):
        return True
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return layer is not None and shape.num_layers <= int(layer[1]) < shape.num_layers + num_mtp_layers
