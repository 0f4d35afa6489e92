"""Turns the ranks' shards into a checkpoint: index, manifest, durable files, then the name. Rank 0's work alone.

Change here: the order in which a checkpoint becomes visible. Nothing imports torch (see saver.py).

    1  every rank's part of the index is there, so its slices are on disk
    2  index.json, manifest.json
    3  every file and folder is on disk, and so are the metrics up to this step
    4  the folder gets its name; there is no pointer beside it that could name another one
    5  older checkpoints are deleted, but for the best
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dapo_mcore.checkpoint.best import METRICS, Best, best_checkpoints
from dapo_mcore.checkpoint.run_folder import commit, drop_old
from dapo_mcore.checkpoint.shard_file import part_path, read_parts
from dapo_mcore.model_files.disk import sync_to_disk
from dapo_mcore.model_files.manifest import write_manifest
from dapo_mcore.model_files.shard_format import INDEX, SHARDS

_POLL_S = 0.05


class Publication(NamedTuple):
    """A checkpoint to be published.

    partial     the folder that the ranks write to
    folder      its name once it is whole
    num_ranks   ranks that write, each a part of the index
    keep        newest checkpoints that are kept; None for all
    best        which others are kept; None for none
    """

    partial: Path
    folder: Path
    num_ranks: int
    keep: int | None
    best: Best | None = None


def publish(job: Publication, warn: Callable[[str], None], check: Callable[[], None] = lambda: None) -> None:
    """Wait for all shards, and publish the checkpoint once. `check` is called while it waits; an exception ends that.

    Raise DamagedCheckpoint if the shards do not hold every element once, OSError where the disk does not take it: nothing is
    visible then.
    """
    shards = job.partial / SHARDS
    for rank in range(job.num_ranks):
        while not part_path(shards, rank).exists():  # one at a time: each look is a request to the disk's server
            os.stat(shards)  # somebody may have deleted what this process made: nobody writes there any more
            check()
            time.sleep(_POLL_S)
    index = read_parts(shards, job.num_ranks)
    (shards / INDEX).write_bytes(index.to_json())
    for rank in range(job.num_ranks):
        part_path(shards, rank).unlink()
    others = [path for path in job.partial.iterdir() if path.is_file()]
    write_manifest(
        job.partial, [*others, shards / INDEX], {shards / name: file.num_bytes for name, file in index.files.items()}
    )
    rows = job.folder.parents[1] / METRICS  # a resumed run needs the rows up to here
    for path in (*job.partial.iterdir(), shards / INDEX, *([rows] if rows.exists() else [])):
        sync_to_disk(path)
    check()
    commit(job.partial, job.folder)
    drop_old(job.folder, job.keep, warn, best_checkpoints(job.folder.parents[1], job.folder, job.best, warn))
