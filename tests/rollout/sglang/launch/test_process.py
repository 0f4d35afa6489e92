"""Server processes: what they wrote last, and how they end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from dapo_mcore.rollout.sglang.launch.process import STOP_S, ServerProcess
from tests.rollout.sglang.asserts import alive
from tests.rollout.sglang.serving import engine, processes, wait_for


def test_the_last_words_are_the_last_error_since_the_start(tmp_path):
    """The server's other processes still write after the error."""
    process = ServerProcess(["true"], {}, tmp_path, "server-0", "http://a:1", SimpleNamespace())
    log = tmp_path / "server-0.log"
    log.write_text("ValueError: of the start before\n")
    process.start()
    process.stop()
    assert process.last_words() == f"it wrote nothing (see {log})" and process.last_line() == ""
    with log.open("a") as file:
        file.write("Traceback\n  File x\n    assert layer.k_scale > 0.0\nAssertionError\n" + "Bye\n" * 9)
    assert process.last_words() == f"File x | assert layer.k_scale > 0.0 | AssertionError (see {log})"
    assert process.last_line() == "Bye"


def test_servers_that_ignore_sigterm_are_killed_after_stop_s_together(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_DEAF", "1")
    with engine(tmp_path, num_servers=4) as made:
        pids = [process.pid for process in processes(made)]
        start = time.monotonic()
        made.close()
        assert time.monotonic() - start < 3 * STOP_S
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_servers_end_when_their_trainer_is_killed(tmp_path):
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[2]); from pathlib import Path\n"
        "from tests.rollout.sglang.serving import engine\n"
        "with engine(Path(sys.argv[1])) as made:\n"
        "    print(made.pool.servers[0].process.pid, flush=True); time.sleep(60)\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), os.getcwd()], stdout=subprocess.PIPE)
    pid = int(trainer.stdout.readline())
    assert alive(pid)
    trainer.kill()
    trainer.wait()
    wait_for(lambda: not alive(pid))
