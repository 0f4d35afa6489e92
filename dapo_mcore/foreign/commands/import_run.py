"""`dapo-mcore import`: a run of another framework becomes a configuration here, with a report of what each setting became.

Change here: what the command reads and writes, and its exit codes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dapo_mcore.config.foreign_names import TITLES
from dapo_mcore.errors import ConfigError, output_error
from dapo_mcore.foreign.convert import Conversion, convert
from dapo_mcore.foreign.read.nemo import read_nemo
from dapo_mcore.foreign.read.script import NotThisDialect
from dapo_mcore.foreign.read.slime import read_slime
from dapo_mcore.foreign.read.verl import read_verl
from dapo_mcore.foreign.report import report
from dapo_mcore.foreign.settings import ForeignRun
from dapo_mcore.foreign.table import Table
from dapo_mcore.foreign.tables.nemo import NEMO
from dapo_mcore.foreign.tables.slime import SLIME
from dapo_mcore.foreign.tables.verl import VERL
from dapo_mcore.foreign.write import run_yaml

OBJECTIVE_LOST = 3
"""The exit code if a lost setting changes what is optimised and is not accepted."""


class Dialect(NamedTuple):
    """How a framework's runs are read, and what their settings become."""

    read: Callable[[Path], ForeignRun]
    table: Table


DIALECTS: Mapping[str, Dialect] = {
    "verl": Dialect(read_verl, VERL),
    "slime": Dialect(read_slime, SLIME),
    "nemo": Dialect(read_nemo, NEMO),
}


def run(dialect: str, file: Path, out: Path | None, accepted: Sequence[str]) -> int:
    """Convert a run of `dialect`, and return the exit code: 0, or 3 if its objective would change.

    With `out` the YAML goes there and the report to standard output; without, the YAML goes to standard output and the report to
    standard error. No YAML is written with exit code 3. Raise ConfigError for a file that is no such run.
    """
    if out is not None:
        _check_out(out)
    conversion = imported(dialect, file)
    left = conversion.unaccepted(accepted)
    print(report(conversion, accepted), end="", file=sys.stderr if out is None else sys.stdout)
    if left:
        print(
            f"dapo-mcore import: nothing is written: {len(left)} lost {'settings change' if len(left) > 1 else 'setting changes'} what "
            f"is optimised ({', '.join(left)}); run it again with --accept {' '.join(left)} if that is meant",
            file=sys.stderr,
        )
        return OBJECTIVE_LOST
    if out is None:
        print(run_yaml(conversion), end="")
        return 0
    _write(out, run_yaml(conversion))
    print(
        f"\nWritten to {out}. Next: dapo-mcore config --only-values {out}, then without --only-values where the files are."
    )
    return 0


def imported(dialect: str, file: Path) -> Conversion:
    """Return the run in `file`, converted. Raise ConfigError for a file that is no run of this dialect."""
    read, table = DIALECTS[dialect]
    try:
        run = read(file)
    except NotThisDialect as error:
        if (other := _dialect_of(file, dialect)) is None:
            raise
        raise ConfigError(f"{error}; it is a run of {TITLES[other]}: dapo-mcore import {other} {file}") from None
    return convert(run, table)


def _dialect_of(file: Path, besides: str) -> str | None:
    """Return the dialect whose reader takes the file, None if no other one does."""
    for name, other in DIALECTS.items():
        try:
            if name != besides and other.read(file).settings:
                return name
        except ConfigError:
            continue
    return None


def _check_out(out: Path) -> None:
    """Raise ConfigError before the report if the YAML could not be written."""
    if out.exists():
        raise ConfigError(f"{out} exists; name another file with -o, or delete it first")
    if not out.parent.is_dir():
        raise ConfigError(
            f"there is no folder {out.parent} for {out.name}; make it first, or name another file with -o"
        )


def _write(out: Path, text: str) -> None:
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise output_error(error, "write the configuration") from error
