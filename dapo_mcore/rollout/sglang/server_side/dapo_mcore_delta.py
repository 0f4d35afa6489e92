"""Changed values of weights, applied inside SGLang by the loaders of its own model classes.

Change here: the form in which changes travel, and how a server applies and checks them. sync/delta.py writes that form.

`load` is given to SGLang as `--custom-weight-loader`. A call of it wraps the model's `load_weights`, so that changes can come by
every way that weights come: SGLang names no loader for a broadcast. A bucket of changes is one pair of a name that begins with
MARK and flat bytes. SGLang's loader then sees a `Changed` tensor in place of each weight: it has the weight's shape and no
values. The loader slices it like the weight, for tensor parallelism and fused parameters, and copies the slice into a parameter.
That copy writes only the changed values, then compares sums of the parameter's bits with those of the trainer's weight.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MARK = "dapo_mcore_delta:"
ALIGNMENT = 8
MAX_COLUMNS = 2**16
"""A column number takes two bytes."""
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SAME = frozenset({"contiguous", "to", "cuda", "cpu", "clone", "detach"})
"""Calls that move or copy a weight. Its changes stay where they are until they are written."""
_VIEWS = frozenset(
    {"narrow", "__getitem__", "__get__", "t", "transpose", "squeeze", "unsqueeze", "chunk", "split", "view"}
)


@dataclass(frozen=True)
class Entry:
    """One tensor in the flat bytes of a bucket.

    start        of its bytes, a multiple of ALIGNMENT.
    num_changed  None: all values are there, in order. Else these follow each other, without gaps:
                 int32 [rows] and [columns]: sums of the new bits of each row and column, modulo 2^32
                 int32 [rows]: number of changed values in each row
                 [num_changed]: new values, row by row
                 uint16 [num_changed]: their columns
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    num_changed: int | None

    @property
    def num_bytes(self) -> int:
        itemsize = self.dtype.itemsize
        if self.num_changed is None:
            return math.prod(self.shape) * itemsize
        rows, columns = self.shape
        return 4 * (2 * rows + columns) + self.num_changed * (itemsize + 2)

    def to_json(self) -> list[Any]:
        dtype = str(self.dtype).removeprefix("torch.")
        return [self.name, list(self.shape), dtype, self.start, self.num_changed]

    @classmethod
    def from_json(cls, row: list[Any]) -> Entry:
        name, shape, dtype, start, num_changed = row
        return cls(name, tuple(shape), getattr(torch, dtype), start, num_changed)


def bits(tensor: Tensor) -> Tensor:
    """Return a view of the tensor as integers. They tell -0.0 from 0.0 and one NaN from another."""
    return tensor.view(_BITS[tensor.dtype.itemsize])


def bit_sums(tensor: Tensor, dim: int) -> Tensor:
    """Return int32: the sums of the tensor's bits along `dim`, modulo 2^32."""
    return bits(tensor).sum(dim, dtype=torch.int32)


@dataclass(frozen=True, eq=False)
class Changes:
    """The changed values of one weight of [rows, columns], and the sums of all its new bits.

    row_sums, column_sums  int32 [rows], [columns]
    rows, columns          int64 [num_changed]: where the changed values are
    values                 [num_changed]
    checks                 gets (description, bool tensor that is True if the sums differ) for each parameter written
    """

    name: str
    shape: tuple[int, int]
    row_sums: Tensor
    column_sums: Tensor
    rows: Tensor
    columns: Tensor
    values: Tensor
    checks: list[tuple[str, Tensor]]

    def write(self, target: Tensor, first_row: int, first_column: int) -> None:
        """Write the changed values of the part that `target` holds, which begins at that row and column."""
        if target.dtype != self.values.dtype:
            raise RuntimeError(
                f"{self.name} came as {self.values.dtype}, but the server holds {target.dtype}; {_REMEDY}"
            )
        num_rows, num_columns = target.shape
        rows, columns, values = self.rows - first_row, self.columns - first_column, bits(self.values)
        if (num_rows, num_columns) != self.shape:
            inside = (rows >= 0) & (rows < num_rows) & (columns >= 0) & (columns < num_columns)
            rows, columns, values = rows[inside], columns[inside], values[inside]
        bits(target)[rows, columns] = values
        self._check(target, first_row, first_column)

    def _check(self, target: Tensor, first_row: int, first_column: int) -> None:
        num_rows, num_columns = target.shape
        if num_columns == self.shape[1]:
            found, expected = bit_sums(target, 1), self.row_sums[first_row : first_row + num_rows]
        elif num_rows == self.shape[0]:
            found, expected = bit_sums(target, 0), self.column_sums[first_column : first_column + num_columns]
        else:
            raise RuntimeError(
                f"SGLang splits {self.name} by rows and columns, so its sums cannot be compared; {_REMEDY}"
            )
        self.checks.append((f"{self.name}[{first_row}:, {first_column}:]", (found != expected).any()))


class Changed(Tensor):
    """Stands for a weight in SGLang's loaders: its shape and dtype, without memory. `changes` has what is new.

    Its views know their place in the weight by torch's offset and strides. A call that is neither a view nor a copy into a
    parameter raises RuntimeError: SGLang would compute with values that are not there.
    """

    changes: Changes

    @classmethod
    def of(cls, changes: Changes) -> Changed:
        made = torch.empty(changes.shape, dtype=changes.values.dtype, device="meta").as_subclass(cls)
        made.changes = changes
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = func.__name__, kwargs or {}
        if name == "copy_" and len(args) > 1 and isinstance(args[1], cls) and not isinstance(args[0], cls):
            args[1]._write(args[0])
            return args[0]
        source = next((value for value in args if isinstance(value, cls)), None)
        if source is not None and name in _SAME and source._keeps_dtype((*args, *kwargs.values())):
            return source
        result = None if name == "__setitem__" else super().__torch_function__(func, types, args, kwargs)
        parts = [
            part for part in (result if isinstance(result, tuple | list) else [result]) if isinstance(part, Tensor)
        ]
        if name == "__setitem__" or (parts and (source is None or name not in _VIEWS)):
            named = source.changes.name if source is not None else "a weight"
            raise RuntimeError(f"SGLang computes {name} with {named} as it loads it, but only changes came; {_REMEDY}")
        for part in parts:
            part.changes = source.changes
        return result

    def _keeps_dtype(self, arguments: tuple[Any, ...]) -> bool:
        return all(value in (None, self.changes.values.dtype) for value in arguments if isinstance(value, torch.dtype))

    def _write(self, target: Tensor) -> None:
        """Write the part of the weight that this view shows into a parameter, or a part of one, of the same shape."""
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            if target.shape != self.shape:
                raise RuntimeError(
                    f"{self.changes.name}: {tuple(self.shape)} does not fit {tuple(target.shape)}; {_REMEDY}"
                )
            target, strides = target.detach(), self.stride()
            while target.dim() > 2 and target.shape[0] == 1:
                target, strides = target[0], strides[1:]
            width = self.changes.shape[1]
            if strides == (1, width):
                target, strides = target.t(), (width, 1)
            if strides != (width, 1):
                raise RuntimeError(
                    f"SGLang reorders {self.changes.name} as it loads it, but only changes came; {_REMEDY}"
                )
            if target.numel():
                self.changes.write(target, *divmod(self.storage_offset(), width))


_REMEDY = "set rollout.sglang.delta false"


def load(model: Any, named_tensors: Any) -> None:
    """Let the model's `load_weights` take changes from now on. SGLang calls this; `named_tensors` is empty."""
    whole = model.load_weights
    if getattr(whole, "takes_changes", False):
        return

    def load_weights(weights: Iterable[tuple[str, Tensor]], *args: Any, **kwargs: Any) -> Any:
        checks: list[tuple[str, Tensor]] = []
        result = whole(expanded(weights, checks), *args, **kwargs)
        raise_if_different(checks)
        return result

    load_weights.takes_changes = True
    model.load_weights = load_weights


def expanded(
    weights: Iterable[tuple[str, Tensor]], checks: list[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor | Changed]]:
    """Yield the weights, with the tensors of each bucket of changes in its place."""
    for name, tensor in weights:
        if name.startswith(MARK):
            for row in json.loads(name.removeprefix(MARK)):
                entry = Entry.from_json(row)
                yield entry.name, decoded(entry, tensor, checks)
        else:
            yield name, tensor


def decoded(entry: Entry, flat: Tensor, checks: list[tuple[str, Tensor]]) -> Tensor | Changed:
    """Return the tensor of an entry of the flat bytes: a view of them if all values came, else what stands for it."""
    own = flat[entry.start : entry.start + entry.num_bytes]
    if entry.num_changed is None:
        return own.view(entry.dtype).view(entry.shape)
    (height, width), count = entry.shape, entry.num_changed
    sizes = [4 * height, 4 * width, 4 * height, entry.dtype.itemsize * count, 2 * count]
    row_sums, column_sums, counts, values, columns = own.split(sizes)
    numbers = torch.arange(height, device=flat.device)
    rows = numbers.repeat_interleave(counts.view(torch.int32).long(), output_size=count)
    columns = columns.view(torch.int16).long() & (MAX_COLUMNS - 1)
    sums = (row_sums.view(torch.int32), column_sums.view(torch.int32))
    return Changed.of(Changes(entry.name, entry.shape, *sums, rows, columns, values.view(entry.dtype), checks))


def raise_if_different(checks: list[tuple[str, Tensor]]) -> None:
    """Raise ValueError if a parameter's bits do not sum up to the trainer's. Waits for the device."""
    if not checks:
        return
    different = torch.stack([wrong for _, wrong in checks]).tolist()
    if names := [name for (name, _), wrong in zip(checks, different) if wrong]:
        raise ValueError(
            f"{len(names)} of {len(checks)} parameters do not hold the trainer's weights after the changes: "
            f"{', '.join(names[:3])}; the server needs a whole copy, and if that does not help, {_REMEDY}"
        )
