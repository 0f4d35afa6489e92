"""Checks that the tensors in a model folder are the model's: names, shapes, dtypes, and finite values.

Change here: which stored tensors are refused. Names, shapes and dtypes come from the files' headers, without reading data.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dapo_mcore.architecture.mapping import WeightReader, check_shapes, parameters
from dapo_mcore.architecture.shape import WeightShape
from dapo_mcore.architecture.weight_rules import EMBEDDING, OUTPUT
from dapo_mcore.errors import CheckpointError

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RECOMPUTED_BUFFERS = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")
"""Suffixes of buffers that old checkpoints contain although every model computes them itself."""


class StoredReader(WeightReader, Protocol):
    """A WeightReader of a folder that also lists the tensors' names and dtypes."""

    folder: Path

    @property
    def names(self) -> Sequence[str]: ...

    def dtype(self, name: str) -> torch.dtype: ...


def check_tensors(reader: StoredReader, shape: WeightShape, num_mtp_layers: int = 0) -> None:
    """Raise CheckpointError for missing, unexpected, misshapen or quantized tensors. Reads no data.

    num_mtp_layers  number of multi-token-prediction layers after the model's own; their tensors are ignored, as transformers
                    does
    """
    _refuse_unexpected(reader, shape, num_mtp_layers)
    for parameter in parameters(shape):
        check_shapes(parameter, reader, shape)
        for name in parameter.hf:
            if (dtype := reader.dtype(name)) not in WEIGHT_DTYPES:
                raise CheckpointError(
                    f"{reader.folder}: {name} is {str(dtype).removeprefix('torch.')}, but weights must be float32, bfloat16 "
                    f"or float16; give the model's unquantized weights"
                )


def check_tied(reader: StoredReader, shape: WeightShape) -> None:
    """Raise CheckpointError if a tied model's folder holds an output head that differs from the embedding.

    transformers would not tie them. Reads both tensors only if the folder holds a head.
    """
    head, embedding = OUTPUT.hf[0], EMBEDDING.hf[0]
    if shape.tied and head in reader.names and not torch.equal(reader.read(head), reader.read(embedding)):
        raise CheckpointError(
            f"{head} differs from {embedding}, but config.json says tie_word_embeddings true; set it false, or remove one"
        )


class FiniteReader:
    """A WeightReader that wraps another one and refuses NaN and infinite values."""

    def __init__(self, reader: WeightReader):
        self._reader = reader

    def shape(self, name: str) -> tuple[int, ...]:
        return self._reader.shape(name)

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """Return the tensor or its slice, as WeightReader.read does. Raises CheckpointError, naming the tensor, for NaN or inf."""
        tensor = self._reader.read(name, dim, start, stop)
        # a finite sum proves that all values are finite; otherwise the sum may have overflowed, so look at every value
        if not tensor.sum(dtype=torch.float32).isfinite() and (wrong := int((~tensor.isfinite()).sum())):
            raise CheckpointError(
                f"{name} holds {wrong} values that are NaN or infinite, of {tensor.numel()} read; the weights come from a "
                f"diverged run or a damaged file: take an earlier checkpoint, or fetch the folder again"
            )
        return tensor


def _refuse_unexpected(reader: StoredReader, shape: WeightShape, num_mtp_layers: int) -> None:
    """Raise CheckpointError if the folder holds tensors that the model does not have."""
    known = {name for parameter in parameters(shape) for name in parameter.hf}
    extra = {name for name in reader.names if name not in known and not _is_ignored(name, shape, num_mtp_layers)}
    if extra:
        raise CheckpointError(
            f"{reader.folder} holds {len(extra)} tensors that {shape.architecture} does not have, such as {min(extra)}; "
            f"config.json and weights belong to different models"
        )


def _is_ignored(name: str, shape: WeightShape, num_mtp_layers: int) -> bool:
    if name.endswith(RECOMPUTED_BUFFERS) or (shape.tied and name == OUTPUT.hf[0]):
        return True
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return layer is not None and shape.num_layers <= int(layer[1]) < shape.num_layers + num_mtp_layers
