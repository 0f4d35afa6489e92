"""Small checkpoints on disk, written without a model, and ways to change or damage one."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dapo_mcore.actor.checkpoint_blocks import CheckpointBlock
from dapo_mcore.checkpoint.best import Best
from dapo_mcore.checkpoint.publish import Publication, publish
from dapo_mcore.checkpoint.run_folder import new_partial
from dapo_mcore.checkpoint.run_state import FORMAT, RunState, TrainState, write_state
from dapo_mcore.checkpoint.shard_file import write_shard
from dapo_mcore.checkpoint.snapshot import Snapshot
from dapo_mcore.model_files.manifest import MANIFEST
from dapo_mcore.model_files.safetensors_file import DTYPES
from dapo_mcore.model_files.shard_reader import ShardReader
from dapo_mcore.model_files.torch_dist import write_chunk, write_metadata

TRAIN = TrainState(2, 4, 2, {"epoch": 0, "offset": 8}, {}, {"x": np.arange(3, dtype=np.int32)}, "seed: 0\n")


def begin(path: Path) -> Path:
    """Write all but tensors of a checkpoint of step 2. Return the folder, which has no name yet."""
    partial = new_partial(path)
    (partial / "shards").mkdir()
    write_state(partial, RunState(FORMAT, TRAIN, {}, reference=False, adam_step=4.0))
    return partial


def write_checkpoint(path: Path, keep: int = 9, best: Best | None = None) -> None:
    """Write a whole checkpoint of step 2: the tensor `w` in the shards of two ranks, and what a run needs beside its tensors."""
    partial = begin(path)
    for rank in (0, 1):
        block = CheckpointBlock("w", (8,), (4 * rank,), torch.zeros(4), is_written=True, is_padded=False)
        snapshot = Snapshot([block])
        write_shard(partial / "shards", rank, snapshot.header, snapshot.slices, snapshot.pieces)
    publish(Publication(partial, path, num_ranks=2, keep=keep, best=best), print)


def write_old_checkpoint(path: Path) -> None:
    """The same in format 2."""
    write_checkpoint(path)
    as_format_2(path)


def as_format_2(path: Path) -> None:
    """Store the same tensors as checkpoints of format 2 do."""
    reader, chunks = ShardReader(path / "shards"), []
    (path / "megatron").mkdir()
    for number, shard in enumerate(reader.paths):
        name = f"__{number}_0.distcp"
        with open(path / "megatron" / name, "wb") as file:
            for key, tensor in reader.tensors.items():
                for part in tensor.slices:
                    if part.file == shard.name:
                        block = reader.read(key, part.offsets, part.sizes)
                        chunks.append(write_chunk(file, name, key, part.offsets, part.sizes, block))
    dtypes = {key: DTYPES[tensor.dtype] for key, tensor in reader.tensors.items()}
    sizes = {key: tensor.shape for key, tensor in reader.tensors.items()}
    write_metadata(path / "megatron", chunks, dtypes, sizes)
    shutil.rmtree(path / "shards")
    (path / MANIFEST).unlink()
    edit_state(path, format=2)


def edit_state(path: Path, **changes: Any) -> None:
    """Change state.json's own fields; `None` deletes one."""
    stored = json.loads((path / "state.json").read_bytes()) | changes
    (path / "state.json").write_text(json.dumps({name: value for name, value in stored.items() if value is not None}))


def edit_train(path: Path, **changes: Any) -> None:
    """Change the fields of state.json's run; `None` deletes one."""
    train = json.loads((path / "state.json").read_bytes())["train"] | changes
    edit_state(path, train={name: value for name, value in train.items() if value is not None})


def unnumbered(path: Path, **fits: Any) -> None:
    """Turn a checkpoint of format 2 into one of format 1, except for its tensors."""
    stored = json.loads((path / "state.json").read_bytes())
    train = stored["train"] | {"config": "parallel: {pipeline_parallel: 2}"}
    own = stored["fits"] | {"optimizer.distributed": True} | fits
    edit_state(path, format=None, adam_step=None, train=train, fits=own)
    torch.save({"optimizer": {"adam_step": stored["adam_step"], "num_updates": 2}}, path / "megatron" / "common.pt")


def truncate(name: str, size: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path / name, size)


def flip(name: str, at: int) -> Callable[[Path], None]:
    """Return what flips one bit of the byte `at`, counted from the end if it is negative."""

    def flip_bit(path: Path) -> None:
        content = bytearray((path / name).read_bytes())
        content[at] ^= 16
        (path / name).write_bytes(content)

    return flip_bit


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def evil_metadata(path: Path) -> None:
    (path / "megatron" / ".metadata").write_bytes(pickle.dumps(Evil(path.parent / "ran")))


def evil_common(path: Path) -> None:
    torch.save({"args": Evil(path.parent / "ran")}, path / "megatron" / "common.pt")


def cut_chunks(path: Path) -> None:
    """Take the last byte from the second file of tensors."""
    file = sorted([*path.glob("*/*.distcp"), *path.glob("*/*.safetensors")])[1]
    os.truncate(file, file.stat().st_size - 1)
