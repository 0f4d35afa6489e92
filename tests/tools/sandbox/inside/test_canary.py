"""The canary's attacks succeed where a wall is missing, so that their failure means something. Each wall is taken away in turn.

These cells stand without a box, as root alone can build them: their walls must hold by themselves.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dapo_mcore.tools.sandbox.inside import canary, landlock
from dapo_mcore.tools.sandbox.worker import Bait

ROOT = Path(__file__).parents[4]
DEPENDS_ON_THE_KERNEL = {"use_io_uring", "open_a_process", "enter_a_namespace", "hold_capabilities"}
NEED_A_BOX = {"see_hidden_files"}
"""What only the view of a box stops. Landlock hides what is in files, not that they exist."""


def breaches(code: str, **variables: str) -> set[str]:
    """Return the names that a program prints as JSON. It gets the bait as its first argument."""
    with Bait() as bait, tempfile.TemporaryDirectory() as folder:
        given = {**bait, "variable": "PLANTED", "system_folders": [folder]}
        command = [sys.executable, "-c", code, json.dumps(given)]
        variables = {"PYTHONPATH": str(ROOT), **variables}
        done = subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_without_walls_every_attack_succeeds():
    code = "import json, sys; from dapo_mcore.tools.sandbox.inside.canary import breaches; print(json.dumps(breaches(json.loads(sys.argv[1]))))"
    held = {attack.__name__ for attack in canary.ATTACKS} - breaches(code, PLANTED="x")
    assert held - DEPENDS_ON_THE_KERNEL == set()


@pytest.mark.parametrize(
    ("without", "some"),
    [
        ("", set()),
        ("seccomp.install = lambda: None", {"open_a_socket", "start_a_process", "start_a_program", "open_a_process"}),
        (
            "landlock.restrict = lambda *_: None",
            {"read_a_planted_key", "follow_a_link_to_the_key", "write_beside_the_key"},
        ),
        ("cell._limit = lambda _: None", {"have_no_limits"}),
        ("kernel.keep_capabilities = lambda: None", {"hold_capabilities"}),
    ],
)
def test_each_wall_alone_stops_some_attacks(without: str, some: set[str]):
    if os.geteuid() != 0 or not landlock.version():
        pytest.skip("a cell without a box needs root and Landlock")
    code = f"""
import json, os, sys
from dapo_mcore.tools.sandbox.inside import canary, cell, kernel, landlock, seccomp
{without}
kernel.unshare(kernel.CLONE_NEWPID | kernel.CLONE_NEWNS)
kernel.mount(None, "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
if os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
cell.enter(cell.Limits(10, 1024, 8, 16), ["/usr", "/lib", "/lib64", sys.prefix, sys.base_prefix], True)
print(json.dumps(canary.breaches(json.loads(sys.argv[1]))), flush=True)
os._exit(0)
"""
    found = breaches(code) - NEED_A_BOX
    assert found >= some
    assert found if without else not found
