"""Distributed checkpoints read without a process group: regions, bytes on disk, threads, and every kind of damage."""

from __future__ import annotations

import errno
import io
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import Metadata

from dapo_mcore.errors import CheckpointError
from dapo_mcore.model_files.torch_dist import DistributedReader, is_checkpoint, without_crc, write_chunk, write_metadata

GRID = torch.arange(24.0).view(4, 6)
LAYERS = torch.arange(2 * 3 * 2, dtype=torch.bfloat16).view(2, 3, 2)


def write_checkpoint(folder: Path) -> Path:
    """Write `grid` in four chunks of 2 × 3, and `layers` in two, one per layer, into two files."""
    folder.mkdir(exist_ok=True)
    chunks = []
    with open(folder / "__0_0.distcp", "wb") as file:
        for row in (0, 2):
            for column in (0, 3):
                block = GRID[row : row + 2, column : column + 3]
                chunks.append(write_chunk(file, "__0_0.distcp", "grid", (row, column), (2, 3), block))
    with open(folder / "__1_0.distcp", "wb") as file:
        for layer in (0, 1):
            chunks.append(write_chunk(file, "__1_0.distcp", "layers", (layer, 0, 0), (1, 3, 2), LAYERS[layer]))
    dtypes, sizes = {"grid": torch.float32, "layers": torch.bfloat16}, {"grid": (4, 6), "layers": (2, 3, 2)}
    write_metadata(folder, chunks, dtypes, sizes)
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint")


def test_the_stored_tensors_are_listed_with_dtype_and_size(checkpoint: Path) -> None:
    reader = DistributedReader(checkpoint)
    assert is_checkpoint(checkpoint) and not is_checkpoint(checkpoint.parent)
    assert {key: (reader.dtype(key), reader.size(key)) for key in reader.tensors} == {
        "grid": (torch.float32, (4, 6)),
        "layers": (torch.bfloat16, (2, 3, 2)),
    }


def test_every_region_of_a_tensor_is_read(checkpoint: Path) -> None:
    reader = DistributedReader(checkpoint)
    for top in range(4):
        for left in range(6):
            for rows in range(1, 5 - top):
                for columns in range(1, 7 - left):
                    found = reader.read("grid", [top, left], [rows, columns])
                    assert torch.equal(found, GRID[top : top + rows, left : left + columns])
    assert torch.equal(reader.read("layers", [1, 1, 0], [1, 2, 2])[0], LAYERS[1, 1:])
    assert reader.read("grid", [4, 0], [0, 6]).shape == (0, 6)


def test_only_the_chunks_of_a_region_are_read(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, count = DistributedReader(checkpoint), []
    original = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: count.append(1) or original(*args, **options))
    reader.read("grid", [0, 1], [2, 2])
    reader.read("grid", [1, 0], [1, 3])  # the same chunk again
    assert len(count) == 1
    reader.read("grid", [0, 2], [2, 2])
    assert len(count) == 2


def test_each_thread_keeps_its_own_last_chunk(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one chunk for all, a thread could get the chunk that another thread has just read."""
    reader, count = DistributedReader(checkpoint), []
    original = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: count.append(1) or original(*args, **options))
    reader.read("grid", [0, 0], [2, 3])
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(reader.read, "grid", [2, 3], [2, 3]).result()
    assert torch.equal(other, GRID[2:, 3:])
    assert torch.equal(reader.read("grid", [0, 0], [2, 3]), GRID[:2, :3])
    assert len(count) == 2


def test_torch_reads_what_we_write(checkpoint: Path) -> None:
    state = {"grid": torch.zeros(4, 6), "layers": torch.zeros(2, 3, 2, dtype=torch.bfloat16)}
    load(state, storage_reader=FileSystemReader(checkpoint), no_dist=True)
    assert torch.equal(state["grid"], GRID) and torch.equal(state["layers"], LAYERS)


def test_a_chunk_holds_only_its_own_elements(tmp_path: Path) -> None:
    """A slice of a large tensor, transposed or not, must not write the whole tensor into the file."""
    large = torch.zeros(1000, 1000)
    for block in (large[:2, :3], large[:3, :2].t(), large[0, :6]):
        write_chunk(file := io.BytesIO(), "name", "key", (0, 0), (2, 3), block)
        assert len(file.getvalue()) < 3000
        file.seek(0)
        assert torch.load(file, weights_only=True).shape == (2, 3)


def test_checksums_are_off_only_inside_the_block(tmp_path: Path) -> None:
    assert torch.serialization.get_crc32_options()
    with pytest.raises(RuntimeError), without_crc():
        assert not torch.serialization.get_crc32_options()
        raise RuntimeError
    assert torch.serialization.get_crc32_options()


def test_a_full_disk_keeps_its_own_error() -> None:
    """torch's zip writer would replace the file's error with its own."""

    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            if self.tell() + len(data) > 2000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    with pytest.raises(OSError, match="No space left") as caught:
        write_chunk(Full(), "name", "key", (0,), (1000,), torch.zeros(1000))
    assert caught.value.errno == errno.ENOSPC


def test_unknown_tensors_are_named(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tensor other; it does not fit its config\.json"):
        DistributedReader(checkpoint).read("other", [0], [1])


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no distributed checkpoint: it lacks \.metadata"):
        DistributedReader(tmp_path)


def test_a_missing_file_is_named(checkpoint: Path) -> None:
    (checkpoint / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp is missing: layers"):
        DistributedReader(checkpoint)


def test_a_truncated_file_is_named(checkpoint: Path) -> None:
    path = checkpoint / "__0_0.distcp"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(
        CheckpointError, match=rf"__0_0\.distcp is truncated: grid ends at its byte {path.stat().st_size + 1}"
    ):
        DistributedReader(checkpoint)


def test_a_file_full_of_zeros_is_damaged(checkpoint: Path) -> None:
    """Some file systems leave such a file after a crash."""
    path = checkpoint / "__0_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is damaged: grid at byte 0"):
        DistributedReader(checkpoint).read("grid", [0, 0], [1, 1])


def edited(checkpoint: Path, edit: Any) -> Path:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    edit(metadata)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    return checkpoint


def layers_at_byte_0(checkpoint: Path, length: int) -> Path:
    """Let `.metadata` say that every chunk of `layers` has these bytes."""

    def edit(metadata: Metadata) -> None:
        for index, place in metadata.storage_data.items():
            if index.fqn == "layers":
                place.offset, place.length = 0, length

    return edited(checkpoint, edit)


def test_chunks_of_another_shape_or_type_are_refused(checkpoint: Path) -> None:
    """The file of another checkpoint may have the same size."""
    path = checkpoint / "__1_0.distcp"
    for stranger in (LAYERS[0].view(1, 2, 3), LAYERS[0].half().view(1, 3, 2), {"a": 1}):
        length = path.stat().st_size
        torch.save(stranger, file := io.BytesIO())
        path.write_bytes(file.getvalue())
        os.truncate(path, max(length, len(file.getvalue())))
        reader = DistributedReader(layers_at_byte_0(checkpoint, len(file.getvalue())))
        with pytest.raises(CheckpointError, match=r"layers at byte 0 is not what \.metadata says"):
            reader.read("layers", [0, 0, 0], [1, 3, 2])


class Evil:
    """Calls os.system when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_runs_a_command_is_refused_and_does_not_run(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read: it wants posix\.system"):
        DistributedReader(checkpoint)
    assert not (tmp_path / "ran").exists()


def test_a_chunk_that_runs_a_command_is_refused_and_does_not_run(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "__1_0.distcp"
    length = path.stat().st_size
    torch.save(Evil(tmp_path / "ran"), file := io.BytesIO())
    path.write_bytes(file.getvalue())
    os.truncate(path, max(length, len(file.getvalue())))
    reader = DistributedReader(layers_at_byte_0(checkpoint, len(file.getvalue())))
    with pytest.raises(CheckpointError, match="is damaged: layers"):
        reader.read("layers", [0, 0, 0], [1, 3, 2])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "data", [b"", b"no pickle", pickle.dumps([1]), pickle.dumps(Metadata({})), pickle.dumps(SimpleNamespace(a=1))]
)
def test_metadata_of_another_kind_is_refused(checkpoint: Path, data: bytes) -> None:
    (checkpoint / ".metadata").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read"):
        DistributedReader(checkpoint)


def test_truncated_metadata_is_refused(checkpoint: Path) -> None:
    data = (checkpoint / ".metadata").read_bytes()
    for size in range(0, len(data) - 1, 7):
        (checkpoint / ".metadata").write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"\.metadata cannot be read"):
            DistributedReader(checkpoint)


def test_a_checkpoint_with_a_missing_chunk_is_refused(checkpoint: Path) -> None:
    edited(checkpoint, lambda metadata: metadata.state_dict_metadata["grid"].chunks.pop())
    with pytest.raises(CheckpointError, match=r"grid \[4, 6\] is stored as 3 chunks of 18 elements in all, not as 24"):
        DistributedReader(checkpoint).read("grid", [0, 0], [1, 1])


def test_a_chunk_without_a_place_in_a_file_is_refused(checkpoint: Path) -> None:
    edited(checkpoint, lambda metadata: metadata.storage_data.popitem())
    with pytest.raises(CheckpointError, match="does not say where all of layers lies"):
        DistributedReader(checkpoint)


def test_chunks_over_several_layers_are_refused(tmp_path: Path) -> None:
    with open(tmp_path / "__0_0.distcp", "wb") as file:
        chunk = write_chunk(file, "__0_0.distcp", "layers", (0, 0, 0), (2, 3, 2), LAYERS)
    write_metadata(tmp_path, [chunk], {"layers": torch.bfloat16}, {"layers": (2, 3, 2)})
    with pytest.raises(
        CheckpointError, match=r"layers \[2, 3, 2\] .* not as 12 in chunks of one layer and expert each"
    ):
        DistributedReader(tmp_path).read("layers", [0, 0, 0], [1, 3, 2])
