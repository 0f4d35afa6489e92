"""A training job as processes: how a rank joins, what watches it, and how it ends. loop.py has the work in between.

Change here: what surrounds the training loop on every rank.
"""

from __future__ import annotations

import os
from functools import partial

from dapo_mcore.actor.parallel import layout as layouts
from dapo_mcore.actor.parallel.determinism import make_deterministic
from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.config.schema import Config
from dapo_mcore.earlier_run import finished_step
from dapo_mcore.observe.progress import NullProgress, Progress
from dapo_mcore.process.beacon import NullBeacon
from dapo_mcore.process.launcher import ranks_here, watch_launcher
from dapo_mcore.process.signals import ControllerShutdown, Interrupted, Shutdown, WorkerShutdown, exit_on_signal
from dapo_mcore.process.watchdog import watch_job
from dapo_mcore.rollout.sglang.assembly import weights_folder
from dapo_mcore.train.loop import Run
from dapo_mcore.train.outputs import how_to_go_on


def train(config: Config) -> None:
    """Run from start or resume to export. Every rank of the job must call it.

    Raise Interrupted after SIGINT, SIGTERM or SIGHUP, on every rank if all have stopped together (see process/signals.py).
    Return early if the file `stop` in the run's folder asks for it (see process/stop_file.py).
    """
    make_deterministic(config)
    with exit_on_signal():  # ranks wait here for each other
        layout = layouts.start(config.parallel, config.seed, partial(_watched, config))
        shutdown = _new_shutdown(config, layout)
    try:
        with shutdown:
            watch_launcher(os.environ, lambda: shutdown.abort("torchrun is gone, so its ranks end"))
            done = layout.on_controller_or_raise(lambda: finished_step(config) if layout.is_controller else None)
            if layout.broadcast_object(done) is None:
                with (
                    Progress(config.name, config.num_rollout_steps, on_advance=layout.beacon.tick)
                    if layout.is_controller
                    else NullProgress() as shown
                ):
                    Run(config, layout, shown, shutdown).loop()
            elif layout.is_controller:
                key = "num_rollout_steps" if config.num_epochs is None else "num_epochs"
                print(
                    f"nothing to do, and nothing changed: rollout step {done} of {config.run_dir} is done, and "
                    f"{key} is {getattr(config, key)}; raise it to go on, or set checkpoint.resume never "
                    "to start anew"
                )
    except Interrupted:
        raise  # the other ranks may be gone, and leaving the job may wait for them
    except BaseException:
        layouts.stop()
        raise
    layouts.stop()
    layout.beacon.leave()


def _watched(config: Config, attempt: str) -> NullBeacon:
    """Return this rank's beacon. The first rank of a node also starts the watchdog there."""
    remove = (weights_folder(config.rollout.sglang, config.run_dir),) if config.rollout.engine == "sglang" else ()
    return watch_job(os.environ, attempt, config.run_dir, config.parallel.hang_minutes, remove)


def _new_shutdown(config: Config, layout: Layout) -> Shutdown:
    neighbours = ranks_here(os.environ)  # all live: they have joined the job
    if layout.is_controller:
        return ControllerShutdown(partial(how_to_go_on, config), neighbours)
    return WorkerShutdown(neighbours)
