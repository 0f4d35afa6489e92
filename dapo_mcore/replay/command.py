"""`dapo-mcore replay RUN STEP [a.b=c …]`: repeats recorded steps and says whether they come out the same.

Change here: arguments, messages and the exit status: 0 the same, 1 different, 2 cannot be repeated.

    dapo-mcore replay runs/a 12                                                                        as it was, one process
    torchrun --nproc-per-node 2 -m dapo_mcore.cli replay runs/a 12 parallel.tensor_parallel=2          on another layout
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import yaml

from dapo_mcore.checkpoint.run_folder import remove
from dapo_mcore.config.file import dump_config, load_config
from dapo_mcore.config.schema import Config
from dapo_mcore.errors import ConfigError, RecordError
from dapo_mcore.process.environment import set_deterministic
from dapo_mcore.process.exit_status import exit_status, record_failure
from dapo_mcore.process.signals import exit_on_signal
from dapo_mcore.replay import record as records
from dapo_mcore.replay.compare import ROUNDING, Check, Verdict, count
from dapo_mcore.replay.record import Setting
from dapo_mcore.replay.recorded_run import read_settings, setting_differences

_ORDER = "another layout adds in another order, and Adam's division makes the smallest gradients' roundings visible"


def run(run_dir: Path, step: int, overrides: Sequence[str], out: Path | None) -> int:
    """Replay the run up to `step` and return the exit status."""
    status = [0]

    def work() -> None:
        status[0] = _run(run_dir, step, overrides, out)

    return exit_status(work) or status[0]


def _run(run_dir: Path, step: int, overrides: Sequence[str], out: Path | None) -> int:
    with exit_on_signal():
        start = records.read_start(run_dir, step)
        config = load_config(records.config_path(run_dir, start.after_step), overrides)
        if config.deterministic:
            set_deterministic(os.environ)
        from dapo_mcore.actor.parallel import layout as layouts
        from dapo_mcore.actor.parallel.determinism import make_deterministic

        make_deterministic(config)
        records.read_step(run_dir, step)  # before a message about processes
        try:
            layout = layouts.start(config.parallel, config.seed)
        except ConfigError as error:
            raise RecordError(
                f"the recorded layout does not fit the processes of this replay: {error}; a replay is `torchrun --nproc-per-node N -m "
                f"dapo_mcore.cli replay {run_dir} {step}`, or takes another layout such as parallel.tensor_parallel=1"
            ) from error
    try:
        from dapo_mcore.replay.replay import Replay

        tell: Callable[[str], None] = _print if layout.is_controller else lambda line: None
        folder = layout.on_controller_or_raise(lambda: _out(run_dir, out, tell) if layout.is_controller else run_dir)
        replay = Replay(config, run_dir, folder, layout, tell)
        report = partial(_report, tell=tell, rounding=ROUNDING[config.model.dtype])
        first = replay.load(step)
        outcome = layout.broadcast_object(report(first.step, first.checks, before=True))
        for number in range(first.step + 1, step + 1):
            if outcome:
                break
            outcome = layout.broadcast_object(report(number, replay.repeat(number).checks))
        if outcome and layout.is_controller:
            _tell_causes(start.setting, replay.setting, records.config_path(run_dir, start.after_step), config)
            record_failure(f"the replay of {run_dir} differs from its record")
        return outcome
    finally:
        layouts.stop()


def _out(run_dir: Path, out: Path | None, tell: Callable[[str], None]) -> Path:
    """Return the folder for the records of the replay. By default they replace those of an earlier replay, which `tell` gets."""
    folder = out or run_dir.with_name(f"{run_dir.name}.replay")
    if folder.resolve() == run_dir.resolve() or run_dir.resolve() in folder.resolve().parents:
        raise RecordError(
            f"--out {folder} lies in {run_dir}, which a replay leaves as it is; choose a folder elsewhere"
        )
    if out is not None and records.record_folder(out).exists():
        raise RecordError(f"--out {out} has records already; choose another folder, or delete {out / 'record'}")
    if records.record_folder(folder).exists():
        tell(f"the records of an earlier replay in {folder} are replaced; --out FOLDER keeps both")
        remove(records.record_folder(folder))
    return folder


def _report(
    step: int, checks: Sequence[Check], tell: Callable[[str], None], rounding: float, before: bool = False
) -> int:
    """Tell what came out, and return the exit status so far."""
    what = f"weights after step {step}, to start from" if before else f"step {step}"
    differing = next((check for check in checks if check.verdict is Verdict.DIFFERS), None)
    if differing is not None:
        tell(f"{what}: differs, first in {differing.name}: {differing.detail}")
        return 1
    if rounded := [check for check in checks if check.verdict is Verdict.ROUNDING]:
        worst = max(rounded, key=lambda check: check.size)
        tell(
            f"{what}: the same within rounding; largest difference {worst.size:.1e} in {worst.name}, and {rounding:.0e} is allowed: "
            f"{_ORDER}"
        )
    elif checks:
        tell(f"{what}: bitwise the same as recorded ({count(len(checks), 'comparison')})")
    else:
        tell(f"{what}: not recorded, so not compared")
    return 0


def _print(line: str) -> None:
    print(line, flush=True)


def _tell_causes(recorded: Setting, here: Setting, path: Path, config: Config) -> None:
    """Print what is not as it was recorded."""
    settings = (read_settings(path) | asdict(recorded), yaml.safe_load(dump_config(config)) | asdict(here))
    changed = setting_differences(*settings)
    for name, ours, theirs in changed:
        print(f"  {name}: {ours} when it was recorded, {theirs} here")
    if not changed:
        print(
            "  configuration, layout, packages, devices and flags are as recorded: a file has changed, or the hardware"
        )
        if not config.deterministic:
            print("  deterministic is false: on GPUs, kernels may add in an order that changes from run to run")
