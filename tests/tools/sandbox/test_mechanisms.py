"""The commands that start a box."""

from __future__ import annotations

import json
import os
import shutil
import sys

import pytest

from dapo_mcore.tools.sandbox import mechanisms
from dapo_mcore.tools.sandbox.inside.cell import Limits

SETTINGS = mechanisms.template_settings(Limits(1, 2, 3, 4), ("math",), needs_landlock=True)


def test_a_box_sees_pythons_folders_but_no_home_and_no_package():
    paths = mechanisms.readable_paths()
    assert "/usr" in paths
    assert all(
        any(prefix == path or prefix.startswith(path + "/") for path in paths)
        for prefix in (sys.prefix, sys.base_prefix)
    )
    assert not {"/", "/etc", "/home", "/root", "/tmp", "/var", os.getcwd()} & set(paths)


def test_settings_are_plain_values():
    assert json.loads(json.dumps(SETTINGS)) == SETTINGS
    assert SETTINGS["limits"] == {"cpu_s": 1, "memory_mib": 2, "disk_mib": 3, "threads": 4}
    assert SETTINGS["preload"] == ["math"] and SETTINGS["needs_landlock"] is True


@pytest.mark.parametrize("user", [0, 1000])
def test_bubblewrap_shares_no_network_and_keeps_only_what_forking_cells_needs(
    monkeypatch: pytest.MonkeyPatch, user: int
):
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(shutil, "which", lambda name: f"/somewhere/{name}")
    command = mechanisms.bubblewrap_command(SETTINGS)
    assert {"--unshare-net", "--unshare-pid", "--unshare-ipc", "--die-with-parent"} <= set(command)
    kept = [command[n + 1] for n, word in enumerate(command) if word == "--cap-add"]
    assert kept == ["CAP_SYS_ADMIN", "CAP_SETUID", "CAP_SETGID", "CAP_KILL"][: 4 if user == 0 else 1]
    assert ("--unshare-user" in command) == (user != 0) and ("--cap-drop" in command) == (user == 0)
    assert "--bind" not in command and command[-1] == json.dumps(SETTINGS)
    assert command[command.index(sys.executable) + 1] == "-I"


def test_code_sees_no_variable_of_the_trainer():
    assert set(mechanisms.ENVIRONMENT) & set(os.environ) <= {"PATH", "HOME", "TMPDIR", "LANG", "TZ", "OMP_NUM_THREADS",
                                                             "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"}  # fmt: skip
    assert mechanisms.ENVIRONMENT["HOME"] == "/tmp"
