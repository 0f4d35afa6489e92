"""A box without bubblewrap: its view of the machine. Attacks on it are in test_pool.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dapo_mcore.tools.sandbox.inside import box, landlock

ROOT = Path(__file__).parents[4]


def test_a_kernel_without_landlock_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(landlock, "version", lambda: 0)
    with pytest.raises(OSError, match=r"no Landlock \(Linux 5\.13"):
        box.main({})


def test_the_view_has_only_what_is_named_and_is_read_only(tmp_path: Path):
    """Also folders below /tmp, which the new root covers, and links."""
    for name in ("seen", "hidden"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / "link").symlink_to("seen")
    code = """
import os, sys
from dapo_mcore.tools.sandbox.inside import box
folder = sys.argv[1]
box._unshare()
box._mount_view([folder + "/seen", folder + "/link", "/usr/bin/env"])
def refused(path):
    try:
        open(path, "w")
    except OSError as error:
        return error.errno == 30
print(sorted(os.listdir(folder)), open(folder + "/link/file").read(), sorted(os.listdir("/")), os.listdir("/dev"))
print(refused(folder + "/seen/file"), refused("/new"), refused("/tmp/new"), open("/dev/null", "w").write("x"))
"""
    command = [sys.executable, "-B", "-c", code, str(tmp_path)]
    done = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    if "Operation not permitted" in done.stderr and os.geteuid() != 0:
        pytest.skip("an ordinary user may not create namespaces here")
    first, second = done.stdout.splitlines() or [done.stderr, ""]
    assert first == "['link', 'seen'] seen ['dev', 'tmp', 'usr'] ['null', 'urandom', 'zero']" or sorted(
        first
    ) == sorted("['link', 'seen'] seen ['dev', 'tmp', 'usr'] ['null', 'urandom', 'zero']")
    assert second == "True True True 1"
