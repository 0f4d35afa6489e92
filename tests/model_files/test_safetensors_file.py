"""Safetensors files: the package reads our files, we read its files, and broken files are recognized."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dapo_mcore.errors import CheckpointError
from dapo_mcore.model_files import safetensors_file
from dapo_mcore.model_files.safetensors_file import DTYPES, SafetensorsFile, SafetensorsWriter, TensorInfo

MATRIX = torch.arange(12, dtype=torch.float32).view(4, 3)


def every_dtype() -> dict[str, torch.Tensor]:
    """Return a random tensor of every dtype, with odd counts, so that types of different widths are neighbours."""
    noise = torch.Generator().manual_seed(0)
    tensors = {}
    for name, dtype in DTYPES.items():
        high = 2 if dtype == torch.bool else 256
        raw = torch.randint(0, high, (15 * dtype.itemsize,), dtype=torch.uint8, generator=noise)
        tensors[name] = raw.view(dtype).view(5, 3)
    tensors["empty"] = torch.empty(0, 7)
    tensors["scalar"] = torch.tensor(2.5, dtype=torch.bfloat16)
    return tensors


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Return True if both are equal bit for bit, NaNs too."""
    raw = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (ours, theirs)]
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(*raw)


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    writer = SafetensorsWriter(path, infos)
    for name in reversed(tensors):  # any order
        writer.write(name, tensors[name])
    writer.close()
    return path


def test_we_read_what_the_package_writes(tmp_path: Path) -> None:
    tensors = every_dtype()
    save_file(tensors, tmp_path / "file")
    found = SafetensorsFile(tmp_path / "file")
    assert found.tensors.keys() == tensors.keys()
    assert [name for name in tensors if not same(found.read(name), tensors[name])] == []


def test_the_package_reads_what_we_write(tmp_path: Path) -> None:
    tensors = every_dtype()
    found = load_file(write(tmp_path / "file", tensors))
    assert found.keys() == tensors.keys()
    assert [name for name in tensors if not same(found[name], tensors[name])] == []
    with safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses files without it


def test_every_tensor_is_aligned_to_its_type_and_there_are_no_gaps(tmp_path: Path) -> None:
    path = write(tmp_path / "file", every_dtype())
    file, data = SafetensorsFile(path), 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert data % 8 == 0
    assert [name for name, info in file.tensors.items() if (data + info.start) % info.dtype.itemsize] == []
    assert data + sum(info.nbytes for info in file.tensors.values()) == path.stat().st_size


def test_a_written_file_has_the_documented_layout(tmp_path: Path) -> None:
    """Eight bytes of length, the header filled with spaces, and the wider type first."""
    tensors = {"b": torch.tensor([1], dtype=torch.int16), "a": torch.tensor([2], dtype=torch.int32)}
    data = write(tmp_path / "file", tensors).read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert json.loads(data[8 : 8 + length]) == {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "I32", "shape": [1], "data_offsets": [0, 4]},
        "b": {"dtype": "I16", "shape": [1], "data_offsets": [4, 6]},
    }
    assert data[8 + length :] == bytes([2, 0, 0, 0, 1, 0])


def test_slices_are_read(tmp_path: Path) -> None:
    file = SafetensorsFile(write(tmp_path / "file", {"a": MATRIX, "b": torch.tensor([1.0, 2.0])}))
    assert file.read("a", 0, 1, 3).tolist() == [[3, 4, 5], [6, 7, 8]]
    assert file.read("a", 1, 2, 3).tolist() == [[2], [5], [8], [11]]
    assert file.read("b", 0, 1, 2).tolist() == [2]
    assert file.read("a", 0, 4, 4).shape == (0, 3)


def test_a_slice_of_rows_reads_only_its_own_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = SafetensorsFile(write(tmp_path / "file", {"a": MATRIX}))
    sizes: list[int] = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, to, at: sizes.append(len(to[0])) or preadv(fd, to, at))
    file.read("a", 0, 1, 3)
    assert sizes == [2 * 3 * 4]


def test_system_calls_that_read_or_write_less_than_asked_are_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux moves at most 2 GiB per call; here a call moves 5 bytes."""

    class Slow:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(data[:5])

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_file, "open", lambda *how, **more: Slow(open(*how, **more)), raising=False)  # noqa: SIM115
        writer = SafetensorsWriter(tmp_path / "file", {"a": TensorInfo(torch.float32, (4, 3))})
    writer.write("a", MATRIX)
    writer.close()
    assert torch.equal(load_file(tmp_path / "file")["a"], MATRIX)
    preadv, calls = os.preadv, []
    monkeypatch.setattr(os, "preadv", lambda fd, to, at: calls.append(at) or preadv(fd, [to[0][:5]], at))
    assert torch.equal(SafetensorsFile(tmp_path / "file").read("a"), MATRIX)
    assert len(calls) == 10  # 48 bytes


@pytest.mark.parametrize(
    ("size", "told"), [(-1, "a ends at byte"), (40, "header does not fit"), (4, "header"), (0, "header")]
)
def test_truncated_files_are_refused(tmp_path: Path, size: int, told: str) -> None:
    save_file({"a": MATRIX}, tmp_path / "file")
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:size])
    with pytest.raises(CheckpointError, match=rf"file is truncated: .*{told}"):
        SafetensorsFile(tmp_path / "file")


def header(**changes: object) -> bytes:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes
    return json.dumps({"a": entry}).encode()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"{", "JSONDecodeError"),
        (b"[]", "TypeError"),
        (b'{"a": 3}', "TypeError"),
        (b'{"a": {}}', "KeyError"),
        (header(dtype="F4"), "a has dtype F4; known are F64, "),
        (header(data_offsets=[0, 7]), "needs 8 bytes, but has 7"),
        (header(data_offsets=[-8, 0]), "needs 8 bytes"),
        (header(shape=[-2, -1]), "shape"),
        (header(shape=["2"]), "TypeError"),
        (b'{"a": 1, "a": 2}', "'a' is given twice"),
    ],
)
def test_broken_headers_are_refused(tmp_path: Path, text: bytes, told: str) -> None:
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(CheckpointError, match=rf"has a broken header: .*{told}"):
        SafetensorsFile(tmp_path / "file")


def test_tensors_that_share_bytes_are_refused(tmp_path: Path) -> None:
    """Two tensors of eight bytes share four; four unused bytes make the sum right."""
    entry = {"dtype": "F32", "shape": [2]}
    text = json.dumps({"a": entry | {"data_offsets": [0, 8]}, "b": entry | {"data_offsets": [4, 12]}}).encode()
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(CheckpointError, match="b begins at byte 4, but a ends at byte 8; fetch it again"):
        SafetensorsFile(tmp_path / "file")


def test_bytes_that_belong_to_no_tensor_are_refused(tmp_path: Path) -> None:
    """The safetensors package refuses them, too: two files were joined, or the header belongs to another file."""
    path = write(tmp_path / "file", {"a": MATRIX})
    path.write_bytes(path.read_bytes() + bytes(4))
    with pytest.raises(CheckpointError, match="has 52 bytes of data, but its tensors 48"):
        SafetensorsFile(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent is missing; fetch the whole folder again"):
        SafetensorsFile(tmp_path / "absent")


def test_a_file_that_shrinks_while_it_is_open_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "file", {"a": MATRIX})
    file = SafetensorsFile(path)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(CheckpointError, match="ended while it was read"):
        file.read("a")


def test_a_file_without_all_its_tensors_cannot_be_closed(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "file", {name: TensorInfo(torch.float32, (4, 3)) for name in "abc"})
    writer.write("b", MATRIX)
    with pytest.raises(CheckpointError, match="lacks 2 of its tensors: a, c"):
        writer.close()


def test_a_tensor_of_another_shape_or_type_is_not_written(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "file", {name: TensorInfo(torch.float32, (4, 3)) for name in "ab"})
    for name, tensor in (("a", MATRIX.t()), ("b", MATRIX.half())):
        with pytest.raises(AssertionError, match=name):
            writer.write(name, tensor)


def test_a_written_tensor_can_still_be_offloaded(tmp_path: Path) -> None:
    tensor = torch.ones(4)
    write(tmp_path / "file", {"a": tensor})
    tensor.untyped_storage().resize_(0)
    assert tensor.untyped_storage().nbytes() == 0
