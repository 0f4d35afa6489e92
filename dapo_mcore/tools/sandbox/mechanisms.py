"""The ways to build a sandbox on this machine, as commands that start a box.

Change here: another way, or what a box may see of the system. `inside/box.py` has the view of a box without bubblewrap.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dapo_mcore.tools.sandbox.inside import cell

_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache", "/nix/store")
_CODE = Path(cell.__file__).parent
"""The folder of the code that runs in a box, which sees nothing else of this package."""
_ROOT = "/inside"
_CODE_IN_A_BOX = f"{_ROOT}/dapo_mcore/tools/sandbox/inside"
_START = """
import json, sys
sys.path.insert(0, {root!r})
from dapo_mcore.tools.sandbox.inside.{module} import {function}
{function}(json.loads(sys.argv[1]))
"""

ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": cell.HOME,
    "TMPDIR": cell.HOME,
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
}
"""All variables that model-written code sees."""

Command = Callable[[dict[str, Any]], list[str]]


def readable_paths() -> list[str]:
    """Return the system's folders and Python's own, which model-written code may read: it imports from there."""
    python = {os.path.abspath(sys.prefix), os.path.abspath(sys.base_prefix), os.path.realpath(sys.base_prefix)}
    paths = [path for path in _SYSTEM if os.path.exists(path)]
    inside = tuple(path + os.sep for path in paths)
    return paths + sorted(path for path in python if not path.startswith(inside) and path not in paths)


def template_settings(limits: cell.Limits, preload: Sequence[str], needs_landlock: bool) -> dict[str, Any]:
    """Return what a box is told when it starts."""
    readable = [*readable_paths(), _ROOT]
    return {
        "limits": asdict(limits),
        "preload": list(preload),
        "readable": readable,
        "needs_landlock": needs_landlock,
    }


def bubblewrap_command(settings: dict[str, Any]) -> list[str]:
    """Return the command of a box made by bubblewrap. Raise FileNotFoundError if it is not installed.

    In a kernel without Landlock, the box's read-only view alone keeps files safe.
    """
    program = shutil.which("bwrap")
    if program is None:
        raise FileNotFoundError("no program bwrap in PATH")
    as_root = os.geteuid() == 0
    capabilities = ("CAP_SYS_ADMIN", *(("CAP_SETUID", "CAP_SETGID", "CAP_KILL") if as_root else ()))
    command = [program, "--die-with-parent", "--new-session"]
    command += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    command += ["--cap-drop", "ALL"] if as_root else ["--unshare-user"]
    for capability in capabilities:
        command += ["--cap-add", capability]
    for folder in _parents(cell.HOME, _CODE_IN_A_BOX, *cell.DEVICES, *readable_paths()):
        command += ["--perms", "0755", "--dir", folder]  # bubblewrap's own choice would shut out all but root
    command += ["--tmpfs", cell.HOME]
    for path in readable_paths():
        command += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    for device in cell.DEVICES:
        command += ["--dev-bind", device, device]
    command += ["--ro-bind", str(_CODE), _CODE_IN_A_BOX, "--remount-ro", cell.HOME, "--remount-ro", "/", "--chdir", "/"]
    return command + _python("template", "serve", _ROOT, settings)


def namespaces_command(settings: dict[str, Any]) -> list[str]:
    """Return the command of a box that builds its namespaces itself. It needs Landlock."""
    return _python("box", "main", str(_CODE.parents[3]), settings)


def _python(module: str, function: str, root: str, settings: dict[str, Any]) -> list[str]:
    """Return the command of an isolated Python that calls a function of `inside/` with the settings."""
    start = _START.format(root=root, module=module, function=function)
    return [sys.executable, "-I", "-X", "utf8", "-c", start, json.dumps(settings)]


def _parents(*paths: str) -> list[str]:
    """Return the folders that contain the paths, outermost first."""
    return sorted({str(parent) for path in paths for parent in Path(path).parents} - {"/"})


MECHANISMS: dict[str, Command] = {"bubblewrap": bubblewrap_command, "namespaces": namespaces_command}
"""In the order in which `auto` tries them."""
