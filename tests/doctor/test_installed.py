"""Asking this environment, also for modules whose import fails or ends the process."""

from __future__ import annotations

from pathlib import Path

import pytest

from dapo_mcore.doctor.installed import has_module, try_import, version

ABORTS = """\
import os, sys
print("half a line", end="")
print("libfoo.so: undefined symbol", file=sys.stderr, flush=True)
os.abort()
"""


def test_distributions_and_modules_are_found_without_importing_them(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "fatal").mkdir()
    (tmp_path / "fatal" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "fatal" / "optimizers.py").write_text("")
    assert (version("pydantic") or "").startswith("2.")
    assert version("no-such-distribution") is None
    assert (has_module("fatal"), has_module("fatal.optimizers"), has_module("fatal.other")) == (True, True, False)
    assert not has_module("amp_C_that_nobody_has")


@pytest.mark.parametrize(
    ("source", "error"),
    [
        (
            "raise ImportError('libcuda.so.1: cannot open\\n shared object file')",
            "ImportError: libcuda.so.1: cannot open shared",
        ),
        ("raise SystemExit(3)", "SystemExit: 3"),
        (ABORTS, "ends the process by SIGABRT: libfoo.so: undefined symbol"),
    ],
)
def test_an_import_that_fails_or_aborts_is_reported(source: str, error: str, tmp_path: Path, monkeypatch) -> None:
    # its own torch, so that this test does not import the real one again and again
    (tmp_path / "torch.py").write_text("")
    (tmp_path / "broken.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert error in (try_import("broken").error or "")


def test_an_import_that_works_tells_the_version(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "torch.py").write_text("")
    (tmp_path / "sound.py").write_text("__version__ = '1.2'\nprint('hello')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = try_import("sound")
    assert (found.error, found.facts, found.cudnn_files) == (None, {"version": "1.2"}, ())
