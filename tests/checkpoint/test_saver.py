"""The process that writes beside training, as its rank sees it. With ranks and models: test_checkpoint.py."""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from dapo_mcore.actor.checkpoint_blocks import CheckpointBlock
from dapo_mcore.checkpoint.background import SaverProcess
from dapo_mcore.checkpoint.best import Best
from dapo_mcore.checkpoint.publish import Publication
from dapo_mcore.checkpoint.snapshot import Snapshot
from dapo_mcore.model_files.shard_reader import ShardReader

WHOLE = torch.arange(40.0).view(5, 8)


@pytest.fixture
def saver() -> Iterator[SaverProcess]:
    saver = SaverProcess()
    yield saver
    saver.close()


def start(
    saver: SaverProcess,
    run_dir: Path,
    step: int,
    num_ranks: int = 1,
    whole: torch.Tensor = WHOLE,
    best: Best | None = None,
) -> Path:
    """Give it the only rank's job, or that of rank 0 of two. Return the folder that it will publish."""
    folder = run_dir / "checkpoints" / f"step_{step:06d}"
    partial = folder.with_name(f"{folder.name}.partial")
    (partial / "shards").mkdir(parents=True, exist_ok=True)
    (partial / "state.json").write_text("{}")
    block = CheckpointBlock("w", tuple(whole.shape), (0, 0), whole.clone(), is_written=True, is_padded=False)
    half = CheckpointBlock("h", (40,), (0,), WHOLE.flatten().to(torch.bfloat16), is_written=True, is_padded=False)
    job = Publication(partial, folder, num_ranks, keep=1, best=best)
    saver.start(Snapshot([half, block]), str(partial / "shards"), 0, job)
    block.data.fill_(torch.nan)  # the copy is the process's
    return folder


def test_one_process_writes_and_publishes_one_checkpoint_after_another(saver: SaverProcess, tmp_path: Path) -> None:
    for step in (1, 2):
        folder = start(saver, tmp_path, step)
        assert saver.wait("done", stall_s=60) is None and saver.wait("written", stall_s=0) is None
        reader = ShardReader(folder / "shards")
        assert torch.equal(reader.read("w", (0, 0), (5, 8)), WHOLE)
        assert torch.equal(reader.read("h", (0,), (40,)), WHOLE.flatten().to(torch.bfloat16))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000002"], "older ones are deleted"


def test_it_leaves_the_best_checkpoint(saver: SaverProcess, tmp_path: Path) -> None:
    rows = ['{"step": 1, "acc": 0.1}', '{"step": 2, "acc": 0.9}', '{"step": 3, "acc": 0.5}']
    for step in (1, 2, 3, 4):
        (tmp_path / "metrics.jsonl").write_text("\n".join(rows[:step]))
        start(saver, tmp_path, step, best=Best(1, "acc", "max"))
        assert saver.wait("done", stall_s=60) is None
    assert sorted(path.name[-1] for path in (tmp_path / "checkpoints").iterdir()) == ["2", "4"]
    assert [line for line in saver.warnings if "rollout step 4 has no metric acc" in line]


def test_it_publishes_nothing_once_its_rank_is_gone(saver: SaverProcess, tmp_path: Path) -> None:
    """It waits for the shard of another rank."""
    start(saver, tmp_path, 1, num_ranks=2)
    assert saver.wait("written", stall_s=60) is None
    assert saver.wait("done", stall_s=0.2) == "the process that writes it has shown no progress for 0 s"
    process = saver._process
    saver._socket.close()
    assert process.wait(30) == 0
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000001.partial"]


def test_a_rank_that_ends_with_unread_messages_is_gone_without_a_traceback(saver: SaverProcess, tmp_path: Path) -> None:
    start(saver, tmp_path, 1)
    while b'"done"' not in saver._socket.recv(1 << 16, socket.MSG_PEEK):
        pass
    saver._socket.close()
    assert saver._process.wait(60) == 0


def test_an_error_of_the_disk_is_a_problem_and_the_process_takes_the_next_job(
    saver: SaverProcess, tmp_path: Path
) -> None:
    folder = start(saver, tmp_path, 1)
    assert saver.wait("done", stall_s=60) is None
    gone = tmp_path / "gone"
    saver.start(Snapshot([]), str(gone), 0, None)
    assert saver.wait("done", stall_s=60) == "No such file or directory"
    assert folder.exists()
    for limit in (10, 300):  # within the header, and within the tensors behind it
        resource.prlimit(saver.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        start(saver, tmp_path, limit)
        assert saver.wait("done", stall_s=60) == "File too large"
    resource.prlimit(saver.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    start(saver, tmp_path, 2)
    assert saver.wait("done", stall_s=60) is None


@pytest.mark.parametrize(
    ("number", "told"), [(signal.SIGKILL, "has ended (signal 9)"), (signal.SIGTERM, "has shown no progress for 0 s")]
)
def test_its_death_is_a_problem_and_signals_to_the_job_do_not_end_it(
    saver: SaverProcess, tmp_path: Path, number: signal.Signals, told: str
) -> None:
    start(saver, tmp_path, 1, num_ranks=2)
    assert saver.wait("written", stall_s=60) is None
    os.kill(saver.pid, number)
    assert told in saver.wait("done", stall_s=30 if number == signal.SIGKILL else 0.2)


def test_a_write_that_stalls_is_a_problem_and_the_process_can_be_replaced(saver: SaverProcess, tmp_path: Path) -> None:
    """A pipe that nobody empties takes the first 64 KiB and then blocks the writer, like a disk that no longer answers."""
    file = tmp_path / "checkpoints/step_000001.partial/shards/rank_00000.safetensors"
    file.parent.mkdir(parents=True)
    os.mkfifo(file)
    reader = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    start(saver, tmp_path, 1, whole=torch.zeros(1024, 1024))
    assert select.select([reader], [], [], 60)[0], "it writes"
    assert saver.wait("written", stall_s=0.5) == "the process that writes it has shown no progress for 0 s"
    saver.close()
    os.close(reader)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000001.partial"]


def test_a_job_given_to_a_dead_process_is_a_problem_too(saver: SaverProcess, tmp_path: Path) -> None:
    os.kill(saver.pid, signal.SIGKILL)
    saver._process.wait()
    start(saver, tmp_path, 1)
    assert saver.wait("written", stall_s=30) == "the process that writes it has ended (signal 9)"


def test_many_saves_take_no_more_memory_and_descriptors_than_a_few(saver: SaverProcess, tmp_path: Path) -> None:
    """Of two sizes by turns, so that each save needs another memory."""
    processes, used = [psutil.Process(), psutil.Process(saver.pid)], []
    for step in range(1, 31):
        start(saver, tmp_path, step, whole=torch.zeros(512, 1024 * (1 + step % 2)))
        assert saver.wait("done", stall_s=60) is None
        used.append([(process.num_fds(), process.memory_info().rss) for process in processes])
    for few, many in zip(used[9], used[29], strict=True):
        assert many[0] - few[0] < 10, "each of 20 saves has descriptors, which close soon after it"
        assert many[1] - few[1] < 20e6, "20 saves write 60 MB"


def test_it_imports_no_framework() -> None:
    """A rank's process costs a few MB, and knows no CUDA."""
    program = (
        "import sys, dapo_mcore.checkpoint.saver; print(sorted({'torch', 'numpy', 'megatron'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
