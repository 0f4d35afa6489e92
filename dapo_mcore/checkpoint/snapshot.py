"""A rank's part of a checkpoint, ready to be written: where each slice lies in the rank's file, and its bytes.

Change here: how tensors become bytes.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator, Sequence

from torch import Tensor

from dapo_mcore.actor.checkpoint_blocks import CheckpointBlock
from dapo_mcore.checkpoint.shard_file import PIECE, PlannedSlice
from dapo_mcore.model_files.safetensors_file import NAMES


class Snapshot:
    """The blocks that a rank writes. `header` and `slices` describe its safetensors file.

    Wider types come first, so that every slice is aligned.
    """

    def __init__(self, blocks: Sequence[CheckpointBlock]):
        ordered = sorted(
            (block for block in blocks if block.data.numel()), key=lambda block: -block.data.element_size()
        )
        entries, position = {}, 0
        for block in ordered:
            stop = position + block.data.nbytes
            name = f"{block.key}[{','.join(map(str, block.offsets))}]"
            shape = list(block.data.shape)
            entries[name] = {"dtype": NAMES[block.data.dtype], "shape": shape, "data_offsets": [position, stop]}
            position = stop
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # keeps the data aligned
        self.header = len(text).to_bytes(8, "little") + text
        self.slices, self._blocks = [], {}
        position = len(self.header)
        for block in ordered:
            planned = PlannedSlice(
                *(block.key, NAMES[block.data.dtype], tuple(block.size), block.offsets, tuple(block.data.shape)),
                *(position, block.data.nbytes),
            )
            self.slices.append(planned)
            self._blocks[position] = block.data
            position += block.data.nbytes
        self.num_bytes = position

    def pieces(self, planned: PlannedSlice) -> Iterator[memoryview]:
        """Yield a slice's bytes from the live tensor. Host memory: one piece, if the tensor is on a device."""
        for piece in _pieces(self._blocks[planned.start]):
            host = piece.cpu().contiguous()
            # not numpy(), after which torch refuses to resize a storage, and so to offload a parameter (actor/memory.py)
            yield memoryview((ctypes.c_ubyte * host.nbytes).from_address(host.data_ptr())).cast("B")


def _pieces(data: Tensor) -> Iterator[Tensor]:
    flat, count = data.detach().view(-1), PIECE // data.element_size()
    return (flat.narrow(0, start, min(count, flat.numel() - start)) for start in range(0, flat.numel(), count))
