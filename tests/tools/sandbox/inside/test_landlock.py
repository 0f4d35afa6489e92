"""Landlock: what stays readable and writable, and the structure for each version of the kernel."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest

from dapo_mcore.tools.sandbox.inside import landlock

ROOT = Path(__file__).parents[4]


@pytest.mark.parametrize(
    ("version", "fields"),
    [
        (1, (2**13 - 1,)),
        (2, (2**14 - 1,)),
        (3, (2**15 - 1,)),
        (4, (2**15 - 1, 3)),
        (5, (2**16 - 1, 3)),
        (6, (2**16 - 1, 3, 3)),
        (9, (2**16 - 1, 3, 3)),
    ],
)
def test_each_version_is_asked_for_what_it_knows(version: int, fields: tuple[int, ...]):
    packed, files = landlock._handled(version)
    assert struct.unpack(f"={len(fields)}Q", packed) == fields
    assert files == fields[0]


def test_only_the_named_files_and_folders_stay(tmp_path: Path):
    if not landlock.version():
        pytest.skip("this kernel has no Landlock")
    for name in ("read", "write", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    code = f"""
import os
from dapo_mcore.tools.sandbox.inside import kernel, landlock
def can(path, mode):
    try:
        open(path, mode).close()
        return True
    except PermissionError:
        return False
os.chdir({str(tmp_path)!r})
kernel.forbid_new_privileges()
landlock.restrict(["read", "absent"], ["write", "/dev/null"])
print(*[int(can(f"{{folder}}/file", mode)) for folder in ("read", "write", "other") for mode in ("r", "a")])
print(int(can("/dev/null", "w")), int(can("write/new", "w")), int(can("read/new", "w")))
"""
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stdout.split() == [*"101100", *"110"], done.stderr
