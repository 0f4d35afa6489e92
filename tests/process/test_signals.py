"""How a signal ends a block of code. Each test runs in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dapo_mcore.process.signals import ControllerShutdown

START = """
import atexit, ctypes, os, signal, sys, threading, time
from dapo_mcore.process import signals
from dapo_mcore.process.signals import ControllerShutdown
from dapo_mcore.process.exit_status import exit_status

def me(signum):
    os.kill(os.getpid(), signum)

def clean():
    me(signal.SIGTERM)
    time.sleep(0.2)
    print("clean")

shutdown = ControllerShutdown(lambda: "go on")
shutdown.cleanup.callback(lambda: clean())
def run(body):
    def work():
        with shutdown:
            body()
    status = exit_status(work)
    if status:
        atexit.register(print, "at exit")
        sys.exit(1)
"""
QUIET = (["clean", "at exit"], ["stopped by SIGINT: go on"])


def ended(script: str) -> tuple[int, list[str], list[str]]:
    """Return the status, standard output and standard error of a process that runs the script."""
    root = str(Path(__file__).parents[2])
    # Python 3.12 warns at every fork of a process with threads, though the child here only sleeps
    command = [sys.executable, "-W", "ignore:This process:DeprecationWarning", "-c", START + script]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


@pytest.mark.parametrize(
    "body",
    {
        "in Python": "me(signal.SIGINT); time.sleep(60)",
        "leads to another error": """
            try:
                me(signal.SIGINT); time.sleep(60)
            finally:
                raise RuntimeError("gloo: Connection closed by peer")
        """,
        "in a finalizer": """
            class Finalized:
                def __del__(self):
                    me(signal.SIGINT); time.sleep(0.01)
            Finalized()
            for _ in range(600):
                time.sleep(0.1)
        """,
    }.items(),
    ids=lambda item: item[0],
)
def test_the_first_signal_ends_the_block_quietly_and_the_next_ones_change_nothing(body):
    script = f"def body():\n            {body[1].strip()}\nrun(body)"
    assert ended(script) == (128 + 2, *QUIET)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_before_anything_is_begun_a_signal_ends_the_process_at_once_with_one_line(name):
    script = f"""
signal.signal(signal.SIGHUP, signal.SIG_DFL)
def work():
    with signals.exit_on_signal():
        pass
    with signals.exit_on_signal():
        threading.Timer(0.1, me, [signal.{name}]).start()
        threading.Lock().acquire(), threading.Event().wait(60)
exit_status(work)
"""
    number = getattr(signal, name)
    assert ended(script) == (128 + number, [], [f"stopped by {name} before the first step; nothing to save"])
    assert ended(f"import os; os.environ['RANK'] = '1'\n{script}") == (-number, [], [])


SAVING = """
signals.REPEAT_S = 0.3
clean = lambda: print("clean", flush=True)
def body():
    with shutdown.defer_signals(lambda: "saves"):
        print(shutdown.run_interruptible(lambda: (me(signal.SIGTERM), time.sleep(60))))
        print(shutdown.run_interruptible(lambda: "not begun"))
        me(signal.SIGTERM)  # torchrun passes on what Slurm has sent to all
        {then}
        print("saved", flush=True)
    print("not reached")
"""


@pytest.mark.parametrize(
    ("then", "said"),
    [
        ("time.sleep(0.1)", ["saved"]),
        ("time.sleep(0.1); raise signals.DapoError('the disk is full')", []),
        ("time.sleep(0.4); me(signal.SIGINT); time.sleep(60)", []),
    ],
    ids=["saved", "not saved", "a second signal ends it at once"],
)
def test_a_deferred_signal_interrupts_interruptible_work_and_lets_the_rest_finish(then, said):
    status, out, err = ended(SAVING.replace("{then}", then) + "run(body)")
    assert (status, out) == (128 + 15, ["None", "None", *said, "clean", "at exit"])
    error = ["error: the disk is full"] if "disk" in then else []
    assert err == ["SIGTERM: saves", *error, "stopped by SIGTERM: go on"]


REQUESTED = """
clean = lambda: print("clean", flush=True)
def body():
    shutdown.request_stop()
    print(shutdown.run_interruptible(lambda: "outside the block"))
    with shutdown.defer_signals(lambda: "saves"):
        print(shutdown.run_interruptible(lambda: "not begun"))
        shutdown._stop_requested = False
        threading.Timer(0.2, shutdown.request_stop).start()
        print(shutdown.run_interruptible(lambda: time.sleep(60)))
        print(shutdown.stop)
run(body)
"""


DEFERRED = """
import subprocess
signals.MAIN_THREAD_TIMEOUT_S, signals.POLL_S = 0.3, 0.05
neighbour = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
shutdown = ControllerShutdown(lambda: "go on", [os.getpid(), neighbour.pid])
def body():
    with shutdown.defer_signals(lambda: "saves"):
        me(signal.SIGTERM)
        time.sleep(0.3)
        print("goes on", flush=True)
        threading.Timer(0.1, lambda: (neighbour.kill(), neighbour.wait())).start()
        ctypes.CDLL(None).sleep(60)
run(body)
"""


def test_a_deferred_signal_ends_a_run_that_waits_for_a_rank_that_has_failed():
    """torchrun signals the other ranks of a machine when one fails; NCCL would wait for it until its time-out."""
    assert ended(DEFERRED) == (128 + 15, ["goes on", "at exit"], ["SIGTERM: saves", "stopped by SIGTERM: go on"])


def test_a_request_interrupts_interruptible_work_and_raises_nothing() -> None:
    assert ended(REQUESTED) == (0, ["outside the block", "None", "None", "Stop(signum=None)", "clean"], [])


def test_a_deferred_signal_is_announced_even_if_the_block_ends_before_its_thread_runs():
    script = """
handle, clean = shutdown._handle_in_signal_thread, lambda: print("clean")
shutdown._handle_in_signal_thread = lambda signum: (time.sleep(0.2), handle(signum))
def body():
    with shutdown.defer_signals(lambda: "saves"):
        me(signal.SIGTERM)
run(body)
"""
    assert ended(script) == (128 + 15, ["clean", "at exit"], ["SIGTERM: saves", "stopped by SIGTERM: go on"])


WORKER = """
signals.REPEAT_S, signals.POLL_S = 0.3, 0.05
import subprocess
controller = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
atexit.register(controller.kill)
worker = signals.WorkerShutdown([os.getpid(), controller.pid])
with worker.defer_signals(lambda: ""):
    me(signal.SIGTERM)
    me(signal.SIGTERM)
    time.sleep(0.5)
    print("follows", flush=True)
    {then}
    time.sleep(60)
"""


@pytest.mark.parametrize(
    "then", ["me(signal.SIGINT)", "controller.kill(); controller.wait()"], ids=["second", "controller"]
)
def test_another_rank_ignores_the_first_signal_and_ends_with_rank_0(then):
    status, out, _ = ended(WORKER.replace("{then}", then))
    assert (status, out) == (128 + (2 if "SIGINT" in then else 15), ["follows"])


def test_a_main_thread_that_does_not_react_is_ended_after_a_deadline():
    """It is inside a C library, which the signal does not interrupt."""
    script = """
signals.MAIN_THREAD_TIMEOUT_S = 0.5
blocked, sleep = threading.Event(), ctypes.CDLL(None).sleep
def strike():
    blocked.wait()
    time.sleep(0.5)
    me(signal.SIGTERM)
def body():
    threading.Thread(target=strike).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    blocked.set()
    sleep(60)
run(body)
"""
    assert ended(script) == (128 + 15, ["clean"], ["stopped by SIGTERM: go on"])


def test_an_error_is_shown_although_a_signal_follows_it():
    """torchrun sends a signal as soon as another rank has ended."""
    status, out, err = ended("def body(): raise ValueError('the cause')\nrun(body)")
    assert (status, out, err[-1]) == (1, ["clean"], "ValueError: the cause")


def test_without_a_signal_the_handlers_of_before_are_restored():
    script = """
before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), sys.unraisablehook
clean = lambda: print("clean", flush=True)
run(lambda: None)
assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), sys.unraisablehook)
assert signal.set_wakeup_fd(-1) == -1
me(signal.SIGTERM)
time.sleep(60)
"""
    assert ended(script) == (-15, ["clean"], [])


def test_the_signals_of_a_forked_child_are_its_own():
    script = """
signals.MAIN_THREAD_TIMEOUT_S = 0.2
clean = lambda: print("clean")
def body():
    for signum in (signal.SIGTERM, signal.SIGINT):
        ready, tell = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(tell, b"!")
            time.sleep(60)
        os.read(ready, 1)
        os.kill(child, signum)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signum
    time.sleep(0.5)
run(body)
"""
    assert ended(script) == (0, ["clean"], [])


def test_an_ignored_signal_stays_ignored():
    script = """
signal.signal(signal.SIGHUP, signal.SIG_IGN)
clean = lambda: print("clean")
run(lambda: me(signal.SIGHUP))
"""
    assert ended(script) == (0, ["clean"], [])


def test_outside_the_main_thread_only_the_cleanup_runs():
    done = []

    def work() -> None:
        with ControllerShutdown(str) as shutdown:
            shutdown.cleanup.callback(done.append, "clean")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == ["clean"]
