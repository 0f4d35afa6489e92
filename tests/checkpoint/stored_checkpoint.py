"""A small checkpoint on disk, written without a model, and ways to change or damage one."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dapo_mcore.checkpoint.run_state import FORMAT, RunState, TrainState, write_state
from dapo_mcore.model_files.torch_dist import write_chunk, write_metadata


def write_checkpoint(path: Path) -> None:
    """A whole checkpoint of step 2: the tensor `w` in two files, and what a run needs beside its tensors."""
    (path / "megatron").mkdir(parents=True)
    train = TrainState(2, 4, 2, {"epoch": 0, "offset": 8}, {}, {"x": np.arange(3, dtype=np.int32)}, "seed: 0\n")
    write_state(path, RunState(FORMAT, train, {}, reference=False, adam_step=4.0))
    chunks = []
    for rank in (0, 1):
        name = f"__{rank}_0.distcp"
        with open(path / "megatron" / name, "wb") as file:
            chunks.append(write_chunk(file, name, "w", (4 * rank,), (4,), torch.zeros(4)))
    write_metadata(path / "megatron", chunks, {"w": torch.float32}, {"w": (8,)})


def edit_state(path: Path, **changes: Any) -> None:
    """Change state.json's own fields; `None` deletes one."""
    stored = json.loads((path / "state.json").read_bytes()) | changes
    (path / "state.json").write_text(json.dumps({name: value for name, value in stored.items() if value is not None}))


def edit_train(path: Path, **changes: Any) -> None:
    """Change the fields of state.json's run; `None` deletes one."""
    train = json.loads((path / "state.json").read_bytes())["train"] | changes
    edit_state(path, train={name: value for name, value in train.items() if value is not None})


def unnumbered(path: Path, **fits: Any) -> None:
    """Turn it into a checkpoint of format 1, except for its tensors."""
    stored = json.loads((path / "state.json").read_bytes())
    train = stored["train"] | {"config": "parallel: {pipeline_parallel: 2}"}
    own = stored["fits"] | {"optimizer.distributed": True} | fits
    edit_state(path, format=None, adam_step=None, train=train, fits=own)
    torch.save({"optimizer": {"adam_step": stored["adam_step"], "num_updates": 2}}, path / "megatron" / "common.pt")


def truncate(name: str, size: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path / name, size)


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
    file = sorted((path / "megatron").glob("*.distcp"))[1]
    os.truncate(file, file.stat().st_size - 1)
