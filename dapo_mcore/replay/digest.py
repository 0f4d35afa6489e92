"""Digests of tensors that are spread over ranks. No parallel layout changes them, so runs of any two layouts can be compared.

Change here: what a digest is made of. Each element is mixed with its position in the whole tensor, and the results are added: so
the order, and the rank that holds an element, do not matter, and ranks need one sum at the end.

    hash        Σ mix(position · ODD + bits) modulo 2^64, with the finalizer of splitmix64 (Steele, Lea, Flood 2014) as mix
    projection  Σ ± element; the sign is a bit of mix(position · ODD)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dapo_mcore.actor.actor import Actor
from dapo_mcore.actor.checkpoint_blocks import CheckpointBlock, checkpoint_blocks, gradient_blocks, written_blocks
from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.replay.record import Digest, Digests
from dapo_mcore.types import MicroBatch

ODD = 0x9E3779B97F4A7C15 - 2**64
"""2^64 divided by the golden ratio: multiples of it stay further apart than the bits of an element reach."""
_MIX = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1))
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNKS = {"cpu": 2**16, "cuda": 2**22}
"""Elements at a time: what a core's cache holds, and on a GPU some 200 MB of temporary memory."""
_MAIN, _GRADIENT = "optimizer.state.param.", "optimizer.state.gradient."
_BESIDE = re.compile(r"(critic\.)?optimizer\.|reference\.")
"""Begins the keys of what are not trained weights."""


class DigestSums:
    """This rank's part of the digests of some tensors."""

    def __init__(self) -> None:
        self._hashes: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}

    @property
    def names(self) -> list[str]:
        return list(self._hashes)

    def add(self, name: str, values: Tensor, positions: Tensor) -> None:
        """Add the elements `values` [n] of the tensor `name`, which have the int64 `positions` [n] in it."""
        keys, wide = positions * ODD, values.double()
        mixed, signed = _mix(keys + _bits(values)), torch.where(_mix(keys) & 1 == 0, wide, -wide)
        self._hashes[name] = self._hashes.get(name, 0) + mixed.sum()
        self._sums[name] = self._sums.get(name, 0) + torch.stack([wide.square().sum(), signed.sum()])

    def add_block(self, block: CheckpointBlock, num_rows: int) -> None:
        """Add a block, but for rows from `num_rows` on of a padded tensor: how many there are depends on the layout."""
        data = block.data
        if block.is_padded:
            data = data[: max(0, num_rows - block.offsets[0])]
        flat = data.reshape(-1)
        dims, chunk = _merged(data.shape, block.size, block.offsets), _CHUNKS[flat.device.type]
        for start in range(0, flat.numel(), chunk):
            stop = min(start + chunk, flat.numel())
            positions = _positions(torch.arange(start, stop, device=flat.device), dims)
            self.add(tensor_name(block), flat[start:stop], positions)

    def reduce(self, names: Sequence[str], layout: Layout) -> Digests:
        """Return the digests of `names` over all ranks, on every rank. Collectives: two gloo all-reduces."""
        hashes, sums = torch.zeros(len(names), dtype=torch.int64), torch.zeros(len(names), 2, dtype=torch.float64)
        if held := [
            number for number, name in enumerate(names) if name in self._hashes
        ]:  # copied at once from a device
            hashes[held] = torch.stack([self._hashes[names[number]] for number in held]).cpu()
            sums[held] = torch.stack([self._sums[names[number]] for number in held]).cpu()
        layout.sum_over_ranks(hashes)
        layout.sum_over_ranks(sums)
        return {
            name: Digest(f"{value % 2**64:016x}", math.sqrt(squares) if squares >= 0 else squares, projection)
            for name, value, (squares, projection) in zip(names, hashes.tolist(), sums.tolist())
        }


class Digester:
    """Digests of one actor's tensors. Every rank calls the same methods in the same order; all get the digests."""

    def __init__(self, actor: Actor):
        self._actor, self._layout = actor, actor.layout
        self._names: dict[str, list[str]] = {}

    def weights(self) -> Digests:
        """Return the digests of the weights of policy and critic, in fp32 if the optimizer has them. Reads this rank's share once.

        Collectives: two gloo all-reduces, and at the first call one gather and one broadcast of the tensors' names.
        """
        blocks = checkpoint_blocks(self._actor)
        own = [block for block in blocks if not _BESIDE.match(block.key)]
        main = [block._replace(key=block.key.replace(_MAIN, "")) for block in blocks if _MAIN in block.key]
        whole = [block for block in own if block.data.dtype == torch.float32]
        return self._reduce("weights", self._sums([*whole, *main]))

    def gradients(self, micro_batches: Sequence[MicroBatch], logprobs: Sequence[Tensor], offsets: Tensor) -> Digests:
        """Return the digests of the gradients that Optimizer.prepare has left, and of a step's log-probs as `logprobs`.

        Collectives: as `weights`.
        """
        blocks = gradient_blocks(self._actor)
        sums = self._sums([block._replace(key=block.key.removeprefix(_GRADIENT)) for block in blocks])
        self._add_tokens(sums, "logprobs", zip(micro_batches, logprobs), offsets)
        return self._reduce("gradients", sums)

    def inputs(self, micro_batches: Sequence[MicroBatch], offsets: Tensor) -> Digests:
        """Return the digests of what the losses read of each loss token: `old_logprobs`, `ref_logprobs`, `advantages`, with a critic
        `values` and `returns`, and `tis_weights` where they are found before the gradient steps.

        offsets  int64 [B+1], of the samples in the batch.
        Collectives: two gloo all-reduces, one gather and one broadcast.
        """
        sums = DigestSums()
        for name in ("old_logprobs", "ref_logprobs", "values", "returns", "tis_weights", "advantages"):
            found = ((micro, values) for micro in micro_batches if (values := getattr(micro, name)) is not None)
            self._add_tokens(sums, name, found, offsets)
        return sums.reduce(self._all_names(sums), self._layout)

    def _sums(self, blocks: Sequence[CheckpointBlock]) -> DigestSums:
        sums = DigestSums()
        for block in written_blocks(blocks):
            sums.add_block(block, self._actor.shape.vocab_size)
        return sums

    def _add_tokens(
        self, sums: DigestSums, name: str, parts: Iterable[tuple[MicroBatch, Tensor]], offsets: Tensor
    ) -> None:
        """Add values of loss tokens, [L] for each micro-batch. Each counts on one rank."""
        if not self._layout.reports_loss:
            return
        for micro, values in parts:
            sums.add(name, values.detach(), token_positions(micro, offsets).to(values.device))

    def _reduce(self, kind: str, sums: DigestSums) -> Digests:
        if kind not in self._names:  # the same in every step
            self._names[kind] = self._all_names(sums)
        return sums.reduce(self._names[kind], self._layout)

    def _all_names(self, sums: DigestSums) -> list[str]:
        found = self._layout.gather_objects(sums.names)
        return self._layout.broadcast_object(sorted({name for names in found for name in names}))


def token_positions(micro: MicroBatch, offsets: Tensor) -> Tensor:
    """Return int64 [L], the position in the whole batch of the token that each row predicts."""
    within = micro.position_ids.t().reshape(-1)[micro.rows]  # as hidden states lie: [s, b]
    return offsets.index_select(0, micro.sample_ids) + within + 1


def tensor_name(block: CheckpointBlock) -> str:
    """Return the name of the block's tensor with the number of its layer, which a stored tensor has as its first dim."""
    return re.sub(r"(\blayers\.)(?!\d)", lambda found: f"{found[1]}{block.offsets[0]}.", block.key)


def _merged(shape: Sequence[int], size: Sequence[int], offsets: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return (extent, size of the whole, offset) of each dim of a rectangle, with dims that it fills merged into the one before."""
    dims = [(1, 1, 0)]
    for extent, whole, offset in zip(shape, size, offsets, strict=True):
        if extent == whole:
            dims[-1] = tuple(value * whole for value in dims[-1])
        else:
            dims.append((extent, whole, offset))
    return dims


def _positions(flat: Tensor, dims: Sequence[tuple[int, int, int]]) -> Tensor:
    """Return the positions in the whole tensor of a rectangle's elements `flat`, both row-major."""
    found, stride = 0, 1
    for extent, whole, offset in reversed(dims[1:]):
        rest = torch.div(flat, extent, rounding_mode="floor")
        found += (flat - rest * extent + offset) * stride
        flat, stride = rest, stride * whole
    return found + (flat + dims[0][2]) * stride


def _bits(values: Tensor) -> Tensor:
    """Return the elements' bits as int64, not negative but for elements of 8 bytes."""
    width = values.element_size()
    bits = values.contiguous().view(_INTEGERS[width]).long()
    return bits if width == 8 else bits & (2 ** (8 * width) - 1)


def _mix(keys: Tensor) -> Tensor:
    for shift, factor in _MIX:
        high = keys >> shift
        high &= 2 ** (64 - shift) - 1  # torch shifts the sign in
        keys = high.bitwise_xor_(keys).mul_(factor)
    return keys
