"""The manifest names a file that is missing, cut or changed. Checkpoints with one: tests/checkpoint/test_stored.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from dapo_mcore.errors import DamagedCheckpoint
from dapo_mcore.model_files.manifest import check_manifest, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shards").mkdir()
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "shards" / "a.safetensors").write_bytes(b"12345")
    write_manifest(tmp_path, [tmp_path / "state.json"], {tmp_path / "shards" / "a.safetensors": 5})
    return tmp_path


def test_an_unchanged_folder_is_whole_and_other_files_do_not_matter(folder: Path) -> None:
    (folder / "notes.txt").touch()
    check_manifest(folder)


def test_a_changed_file_is_named(folder: Path) -> None:
    (folder / "state.json").write_text("[]")
    with pytest.raises(DamagedCheckpoint, match=r"state\.json is changed: its SHA-256 is not that of manifest\.json"):
        check_manifest(folder)


def test_a_file_of_tensors_is_known_by_its_size(folder: Path) -> None:
    path = folder / "shards" / "a.safetensors"
    path.write_bytes(b"54321")
    check_manifest(folder)
    path.write_bytes(b"5432")
    with pytest.raises(DamagedCheckpoint, match=r"a\.safetensors is truncated: 4 of 5 bytes"):
        check_manifest(folder)
    path.unlink()
    with pytest.raises(DamagedCheckpoint, match=r"a\.safetensors is missing"):
        check_manifest(folder)


@pytest.mark.parametrize("content", ["", "[]", '{"files": {"a": 1}}', '{"files": []}'])
def test_what_is_no_manifest_is_damaged(folder: Path, content: str) -> None:
    (folder / "manifest.json").write_text(content)
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json is damaged: "):
        check_manifest(folder)
