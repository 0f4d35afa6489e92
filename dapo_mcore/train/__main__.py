"""The start of a training process: `torchrun --nproc-per-node N -m dapo_mcore.train CONFIG.yaml [a.b=c …]`, or without
torchrun as one process.

The configuration is read, and what it names is checked, before the loop is imported: torch and Megatron take up to a minute,
and a typo is told at once. Nearly all is imported where a signal ends the process with one line.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import dapo_mcore.process.environment  # noqa: F401  before torch is imported
from dapo_mcore.process.exit_status import exit_status
from dapo_mcore.process.signals import exit_on_signal

if TYPE_CHECKING:
    from dapo_mcore.config.schema import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Train by a configuration file and return the exit status: 0 done, 2 an error the user can mend, 128 + a signal."""
    parser = argparse.ArgumentParser(prog="python -m dapo_mcore.train", description="Train a policy with DAPO.")
    parser.add_argument("config", help="YAML file, see examples/")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="configuration values to replace")
    options, rest = parser.parse_known_args(argv)
    if rest:
        from dapo_mcore.config.foreign_lookup import unknown_arguments

        parser.error(unknown_arguments(rest))
    return exit_status(lambda: _train(options.config, options.overrides))


def _train(path: str, overrides: Sequence[str]) -> None:
    with exit_on_signal():
        config = _checked(path, overrides)
        _download(config)
        from dapo_mcore.train.job import train

    train(config)


def _download(config: Config) -> None:
    """Download a model of the hub before processes wait for each other; one of each node does it."""
    from dapo_mcore.model_files.model_folder import hub_name, model_folder

    if hub_name(config.model.path) is not None:
        folder = model_folder(config.model, weights=config.model.init == "pretrained")
        if os.environ.get("RANK", "0") == "0":
            print(f"model.path {config.model.path} is {folder}", flush=True)


def _checked(path: str, overrides: Sequence[str]) -> Config:
    """Return the configuration. Raise the DapoError that the run would end with as far as it can be known here."""
    from dapo_mcore.checkpoint.run_folder import latest_checkpoint
    from dapo_mcore.config.file import load_config, repeated_overrides
    from dapo_mcore.preflight import check_run, describe_run
    from dapo_mcore.process.attempt import check_progress
    from dapo_mcore.process.environment import set_deterministic
    from dapo_mcore.process.launcher import check_launcher

    config = load_config(path, overrides)
    if config.deterministic:
        set_deterministic(os.environ)
    check_launcher(os.environ)
    if os.environ.get("RANK", "0") == "0":
        for note in repeated_overrides(overrides):
            print(f"note: {note}")
        latest = latest_checkpoint(config.run_dir)
        check_progress(os.environ, latest.name if latest else "nothing")
        check_run(config, int(os.environ.get("WORLD_SIZE", "1")))
        print("\n".join(describe_run(config)), flush=True)
    return config


if __name__ == "__main__":
    sys.exit(main())
