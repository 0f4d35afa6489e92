"""Run the command line with a mistake of its user."""

from __future__ import annotations

import pytest

from dapo_mcore.cli import main


def mistake(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the message of a call that must end with status 2: printed in short lines, without a traceback."""
    assert main(argv) == 2, argv
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"dapo-mcore {argv[0]}: ")
    lines = err.splitlines()
    assert all(len(line) < 500 for line in lines), err
    return err
