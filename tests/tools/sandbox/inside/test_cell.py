"""The walls around a call; test_canary.py attacks them, test_pool.py its contents."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dapo_mcore.tools.sandbox.inside import cell, landlock

ROOT = Path(__file__).parents[4]


def test_limits_never_exceed_those_that_the_machine_has_set():
    code = """
import resource as r
from dapo_mcore.tools.sandbox.inside import cell
r.setrlimit(r.RLIMIT_CPU, (7, 7))
cell._limit(cell.Limits(cpu_s=9, memory_mib=256, disk_mib=1, threads=5))
print([r.getrlimit(kind) for kind in (r.RLIMIT_CPU, r.RLIMIT_AS, r.RLIMIT_FSIZE, r.RLIMIT_NPROC, r.RLIMIT_CORE)])
"""
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    limits = [7, 256 << 20, 1 << 20, 5, 0]
    assert done.stdout.strip() == str([(limit, limit) for limit in limits]), done.stderr


def test_a_kernel_without_landlock_is_refused_where_it_is_needed(monkeypatch: pytest.MonkeyPatch):
    steps = []
    monkeypatch.setattr(landlock, "version", lambda: 0)
    for module, name in (
        (cell.kernel, "unshare"),
        (cell.kernel, "keep_capabilities"),
        (cell.kernel, "forbid_new_privileges"),
        (cell.seccomp, "install"),
        (cell, "_mount_home"),
        (cell, "_become_nobody"),
        (cell, "_limit"),
    ):
        monkeypatch.setattr(module, name, lambda *_, name=name: steps.append(name))
    limits = cell.Limits(1, 1, 1, 1)
    with pytest.raises(OSError, match="no Landlock"):
        cell.enter(limits, [], needs_landlock=True)
    assert "install" not in steps
    cell.enter(limits, [], needs_landlock=False)
    assert steps[-1] == "install"
