"""A rank's part of a checkpoint, ready to be written: where each slice lies in the rank's file, and its bytes.

Change here: how tensors become bytes.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator, Sequence

import torch
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

    @torch.no_grad()
    def copy_to(self, memory: Tensor, *, non_blocking: bool = False) -> None:
        """Copy header and slices into `memory`, [num_bytes] uint8, as they lie in the file, and wait until they are there."""
        memory[: len(self.header)] = torch.frombuffer(bytearray(self.header), dtype=torch.uint8)
        for planned in self.slices:
            block = self._blocks[planned.start]
            target = memory.narrow(0, planned.start, planned.num_bytes).view(block.dtype).view(block.shape)
            target.copy_(block, non_blocking=non_blocking)
        if non_blocking:
            torch.cuda.synchronize()


def _pieces(data: Tensor) -> Iterator[Tensor]:
    flat, count = data.detach().view(-1), PIECE // data.element_size()
    return (flat.narrow(0, start, min(count, flat.numel() - start)) for start in range(0, flat.numel(), count))
