"""The pool of reward processes: order, deadlines, dying workers, and no process left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path

import psutil
import pytest

from dapo_mcore.errors import RewardError
from dapo_mcore.reward.attempt import Attempt, Outcome
from dapo_mcore.reward.plugins import Rule
from dapo_mcore.reward.pool import RewardPool
from tests.reward.waiting import wait_for

ZOO = Path(__file__).with_name("plugin_zoo.py")


@contextmanager
def pool(num_workers: int = 2, timeout_seconds: float = 30.0, function: str = f"{ZOO}:by_text") -> Iterator[RewardPool]:
    workers = RewardPool(num_workers, Rule(function), timeout_seconds)
    try:
        yield workers
    finally:
        workers.close()


def attempts(*responses: str) -> list[Attempt]:
    return [Attempt("q", response, "a") for response in responses]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_outcomes_come_back_in_order_and_workers_are_reused():
    with pool() as workers:
        assert workers.score([]) == []
        slow_first = workers.score(attempts("sleep 0.2", *(f"score {n}" for n in range(-3, 9))))
        assert [outcome.score for outcome in slow_first] == [1.0, *map(float, range(-3, 9))]
        pids = [{outcome.pred for outcome in workers.score(attempts(*["pid"] * 8))} for _ in range(2)]
        assert len(pids[0] | pids[1]) <= 2


def test_a_hanging_or_dying_worker_loses_only_its_own_sample():
    work = ["score 1", "spin", "exit 7", "sleep 60", "raise no", "leave 2", "score nan", *["score 2"] * 20]
    with pool(timeout_seconds=3.0) as workers:
        start_s = time.monotonic()
        outcomes = workers.score(attempts(*work))
        assert time.monotonic() - start_s < 50  # one of them sleeps for 60
        assert [outcome.failure for outcome in outcomes[:7]] == [
            None,
            "timeout",
            "exit: the reward process ended with code 7",
            "timeout",
            "exception: ValueError: no",
            "exception: SystemExit: 2",
            "nan",
        ]
        assert outcomes[7:] == [Outcome(2.0, True)] * 20
        assert workers.score(attempts("score 3")) == [Outcome(3.0, True)]


@pytest.mark.parametrize("word", ["spin", "exit 7"])
def test_a_function_that_never_answers_ends_the_run_early_in_its_first_step(monkeypatch, word: str):
    monkeypatch.setattr("dapo_mcore.reward.pool.HOPELESS", 3)
    lost = "timeout" if word == "spin" else "exit: the reward process ended with code 7"
    told = rf"by_text' has answered none of its first 3 samples \(the last: {lost}; reward.timeout_seconds is 0.2\)"
    with pool(num_workers=1, timeout_seconds=0.2) as workers, pytest.raises(RewardError, match=told):
        workers.score(attempts(*[word] * 1000))
    with pool(num_workers=1, timeout_seconds=0.2) as workers:
        assert workers.score(attempts("score 1", *[word] * 3))[-1].failure == lost


def test_a_late_worker_that_ended_itself_before_the_controller_looked_counts_as_a_timeout(monkeypatch):
    # as on a busy machine: the controller wakes up only when there is something to read
    monkeypatch.setattr("dapo_mcore.reward.pool.wait", lambda connections, timeout: wait(connections))
    with pool(num_workers=1, timeout_seconds=0.2) as workers:
        assert [outcome.failure for outcome in workers.score(attempts("spin"))] == ["timeout"]
    with pool(num_workers=1) as workers:
        ended = "exit: the reward process ended with code 1"
        assert [outcome.failure for outcome in workers.score(attempts("exit 1", "score 2"))] == [ended, None]


def test_a_worker_killed_while_idle_is_replaced_without_a_failure():
    with pool(num_workers=1) as workers:
        (before,) = workers.score(attempts("pid"))
        os.kill(int(before.pred), 9)
        wait_for(lambda: psutil.Process(int(before.pred)).status() == psutil.STATUS_ZOMBIE)
        (after,) = workers.score(attempts("pid"))
        assert after.failure is None
        assert after.pred != before.pred


def test_an_interrupted_call_closes_the_pool(tmp_path: Path):
    def interrupt(*_):
        raise KeyboardInterrupt

    with pool() as workers:
        (outcome,) = workers.score(attempts("pid"))
        before = signal.signal(signal.SIGALRM, interrupt)
        begun = tmp_path / "begun"
        alarm = threading.Thread(target=lambda: (wait_for(begun.exists), os.kill(os.getpid(), signal.SIGALRM)))
        alarm.start()
        with pytest.raises(KeyboardInterrupt):
            workers.score(attempts(f"hang-once {begun}", "sleep 60"))
        alarm.join()
        signal.signal(signal.SIGALRM, before)
        assert gone(int(outcome.pred))


def test_large_responses_reach_the_function():
    with pool(num_workers=1, function=f"{ZOO}:length") as workers:
        assert workers.score(attempts("x" * 1_000_000)) == [Outcome(1e6, True)]


def test_close_leaves_no_process():
    with pool() as workers:
        pids = {int(outcome.pred) for outcome in workers.score(attempts(*["pid"] * 6))}
        workers.close()
        assert pids and all(gone(pid) for pid in pids)


def test_workers_end_when_the_controller_is_killed():
    script = f"""
import time
from dapo_mcore.reward.attempt import Attempt
from dapo_mcore.reward.plugins import Rule
from dapo_mcore.reward.pool import RewardPool
pool = RewardPool(2, Rule("{ZOO}:by_text"), 60.0)
print(*(outcome.pred for outcome in pool.score([Attempt("q", "pid", "a")] * 4)), flush=True)
time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    ) as controller:
        pids = [int(pid) for pid in controller.stdout.readline().split()]
        controller.kill()
    assert pids
    wait_for(lambda: all(map(gone, pids)))


def test_a_function_that_cannot_be_loaded_fails_at_once():
    with pytest.raises(RewardError, match="has no function 'absent'"):
        RewardPool(2, Rule(f"{ZOO}:absent"), 30.0)


def test_a_file_that_ends_the_process_on_import_is_named(tmp_path: Path):
    (tmp_path / "ends.py").write_text("import os; os._exit(5)")
    with pytest.raises(RewardError, match="did not start: exit: the reward process ended with code 5"):
        RewardPool(1, Rule(f"{tmp_path / 'ends.py'}:f"), 30.0)
