"""A checkpoint becomes visible once and whole: a kill at any file operation loses nothing, and any changed byte is found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dapo_mcore.checkpoint.publish import Publication, publish
from dapo_mcore.checkpoint.stored import check_stored
from dapo_mcore.errors import DamagedCheckpoint, DapoError
from dapo_mcore.model_files.megatron_folder import open_store
from tests.checkpoint.stored_checkpoint import write_checkpoint

ROOT = Path(__file__).parents[2]
# saves step 2 beside step 1 again and again; the n-th time it dies at the n-th file operation
KILLER = """
import itertools, json, os, sys
from pathlib import Path
from tests.checkpoint.stored_checkpoint import write_checkpoint

base, seen = Path(sys.argv[1]), []
for number in itertools.count():
    write_checkpoint(base / str(number) / "checkpoints" / "step_000001")
    if (child := os.fork()) == 0:
        left = iter(range(number))

        def dying(name, function):
            def call(*arguments, **more):
                if next(left, None) is None:
                    (base / f"{number}.died").write_text(name)
                    os._exit(9)
                return function(*arguments, **more)
            return call

        write_text = Path.write_text
        for name in ("fsync", "fdatasync", "rename", "replace", "mkdir", "unlink", "rmdir", "posix_fadvise"):
            setattr(os, name, dying(name, getattr(os, name)))
        from dapo_mcore.checkpoint import publish
        publish.drop_old = lambda folder, keep, warn, drop=publish.drop_old: drop(folder, 1, warn)
        write_checkpoint(base / str(number) / "checkpoints" / "step_000002")
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
print(number)
"""


def loads(path: Path) -> None:
    """Read all of a checkpoint. Raise a DapoError if it is damaged."""
    check_stored(path)
    assert torch.equal(open_store(path).read("w", (0,), (8,)), torch.zeros(8))


def test_a_kill_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLER, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=True)
    count = int(done.stdout)
    operations = [(tmp_path / f"{number}.died").read_text() for number in range(count)]
    assert count > 20 and {"fsync", "rename", "replace", "mkdir", "unlink", "rmdir"} <= set(operations)
    published = []
    for number in range(count):
        whole = sorted((tmp_path / str(number) / "checkpoints").glob("step_00000?"))
        for path in whole:
            loads(path)
        published.append(whole[-1].name)
    first = published.index("step_000002")
    assert set(published[:first]) == {"step_000001"} and set(published[first:]) == {"step_000002"}
    assert operations[first - 1] == "rename" and 0 < first < count


def test_any_changed_byte_is_found_before_it_is_used(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "step_000002"
    write_checkpoint(path)
    loads(path)
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        content = file.read_bytes()
        for at in range(len(content)):
            file.write_bytes(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
            with pytest.raises(DapoError):
                loads(path)
                pytest.fail(f"byte {at} of {file.name}")
        file.write_bytes(content)
    loads(path)


def test_an_exchanged_place_in_the_index_is_found_by_every_reader(tmp_path: Path) -> None:
    """Both slices would still hold their bytes."""
    path = tmp_path / "checkpoints" / "step_000002"
    write_checkpoint(path)
    index = path / "shards" / "index.json"
    content = index.read_text()
    assert "[[[0],[4]" in content and "[[4],[4]" in content
    index.write_text(
        content.replace("[[0],[4]", "[[9],[4]").replace("[[4],[4]", "[[0],[4]").replace("[[9],[4]", "[[4],[4]")
    )
    with pytest.raises(DamagedCheckpoint, match=r"index\.json is changed: its SHA-256 is not that of manifest\.json"):
        open_store(path)


def test_it_waits_for_every_rank_and_an_exception_of_the_check_ends_that(tmp_path: Path) -> None:
    partial = tmp_path / "checkpoints" / "step_000002.partial"
    (partial / "shards").mkdir(parents=True)
    (partial / "shards" / "rank_00000.json").write_text(json.dumps({}))

    class Enough(Exception):
        pass

    def enough() -> None:
        raise Enough

    with pytest.raises(Enough):
        publish(Publication(partial, partial.with_suffix(""), num_ranks=2, keep=1), print, check=enough)
    assert [path.name for path in partial.parent.iterdir()] == [partial.name]
    (partial / "shards" / "rank_00001.json").write_text(json.dumps({}))
    with pytest.raises(DamagedCheckpoint, match=r"rank_00000\.json is damaged"):
        publish(Publication(partial, partial.with_suffix(""), num_ranks=2, keep=1), print)


def test_a_folder_that_is_deleted_while_it_waits_is_an_error_at_once(tmp_path: Path) -> None:
    partial = tmp_path / "checkpoints" / "step_000002.partial"
    (partial / "shards").mkdir(parents=True)
    looks = iter([lambda: shutil.rmtree(partial), lambda: pytest.fail("it waits on")])
    with pytest.raises(FileNotFoundError):
        publish(Publication(partial, partial.with_suffix(""), num_ranks=1, keep=1), print, lambda: next(looks)())
    assert list(partial.parent.iterdir()) == []
