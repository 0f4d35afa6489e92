"""Which standstill is a hang, and which rank is called guilty, by hand-made states of four ranks."""

from __future__ import annotations

import pytest

from dapo_mcore.process.hang import Limits, RankState, hangs, judge, main_thread

LIMITS = Limits(minutes=1.0, dead_s=60.0, disagree_s=120.0)
STACKS = """Thread 0x00007f01 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 324 in wait

Current thread 0x00007f02 (most recent call first):
  File "{innermost}", line 12 in function
  File "/x/dapo_mcore/train/loop.py", line 100 in _train_step
"""
COLLECTIVE = STACKS.format(innermost="/x/torch/distributed/distributed_c10d.py")
BACKWARD = STACKS.replace("in function", "in _engine_run_backward").format(innermost="/x/torch/autograd/graph.py")
OWN_CODE = STACKS.format(innermost="/x/dapo_mcore/actor/learner.py")


def state(rank: int, phase: str = "train", waits_for: str = "", num_waits: int = 9, **changes) -> RankState:
    found = RankState(rank, f"node{rank // 2}", 100 + rank, phase, waits_for, num_waits, 500.0, "runs", 500.0)
    return found._replace(**changes)


def four(odd: RankState, like: RankState) -> list[RankState]:
    """Return four ranks that are alike, but for the odd one."""
    return [odd if rank == odd.rank else like._replace(rank=rank, pid=100 + rank) for rank in range(4)]


WAITING = state(0, waits_for="broadcast", num_waits=10)


@pytest.mark.parametrize(
    ("odd", "like", "expected"),
    [
        (state(0, "generate", age_s=239.0), WAITING, False),  # its responses are long, and nobody else counts
        (state(0, "generate", age_s=241.0), WAITING, True),
        (state(1, "train", age_s=59.0), state(0, "train", age_s=59.0), False),
        (state(1, "train", age_s=61.0), state(0, "train", age_s=59.0), True),
        (state(2, "save", age_s=119.0), WAITING, False),
        (state(2, "save", age_s=121.0), WAITING, True),
        (state(3, condition="stopped", condition_s=59.0, age_s=59.0), WAITING, False),
        (state(3, condition="stopped", condition_s=61.0, age_s=1e6), WAITING, True),
        (state(3, condition="gone", condition_s=61.0), WAITING, True),
        (state(3, condition="silent", condition_s=181.0), WAITING._replace(age_s=181.0), True),
        (state(3, condition="silent", condition_s=181.0), WAITING._replace(age_s=179.0), False),  # the others get on
        (state(3, "left", condition="left"), state(0, "left", condition="left"), False),
        (state(3, waits_for="barrier"), WAITING._replace(age_s=119.0), False),
        (state(3, waits_for="barrier"), WAITING._replace(age_s=121.0), True),
        (state(3, "left", condition="left"), WAITING, True),
    ],
)
def test_only_a_rank_that_works_or_is_dead_or_a_wait_of_all_is_a_hang(odd, like, expected) -> None:
    assert hangs(four(odd, like), LIMITS) is expected


@pytest.mark.parametrize("guilty", range(4))
@pytest.mark.parametrize(
    ("changes", "like", "stacks", "said"),
    [
        (
            {"condition": "stopped", "condition_s": 61.0},
            state(0),
            {},
            "is stopped, by SIGSTOP or a debugger, for 61 s, in phase train",
        ),
        ({"condition": "gone"}, WAITING, {}, "has ended without a message, in phase train"),
        ({"phase": "save"}, WAITING, {}, "is in phase save, without progress for 500 s"),
        ({}, state(0), {"odd": OWN_CODE, "like": COLLECTIVE}, "is in phase train, without progress for 500 s"),
        ({}, state(0), {"odd": OWN_CODE, "like": BACKWARD}, "is in phase train, without progress for 500 s"),
        # it has returned early: it waits further on, and the others work in a collective of the device
        (
            {"waits_for": "broadcast", "num_waits": 10},
            state(0),
            {"odd": COLLECTIVE, "like": COLLECTIVE},
            "is in phase train, waiting in collective 10 (broadcast)",
        ),
        (
            {"waits_for": "barrier", "num_waits": 10},
            WAITING,
            {},
            "is in phase train, waiting in collective 10 (barrier)",
        ),
    ],
    ids=["stopped", "gone", "behind", "in its own code", "beside a backward pass", "early", "another collective"],
)
def test_the_odd_one_out_is_guilty_and_no_victim_is(guilty, changes, like, stacks, said) -> None:
    states = four(state(guilty)._replace(**changes), like)
    texts = {rank: stacks["odd" if rank == guilty else "like"] for rank in range(4) if stacks}
    verdict = judge(states, texts)
    others = ", ".join(str(rank) for rank in range(4) if rank != guilty)
    assert verdict.guilty == (guilty,)
    assert verdict.message.startswith(f"hang: rank {guilty} on node{guilty // 2} (process {100 + guilty}) {said}")
    waiting, advice = verdict.message.split("; ")[-1].split(". ")
    assert waiting == f"ranks {others} wait for it"
    assert advice == {
        "stopped": "The same command goes on from the newest checkpoint",
        "gone": f"dmesg on node{guilty // 2} says whether the kernel has killed it because memory ran out",
    }.get(changes.get("condition"), "If this may take so long, raise parallel.hang_minutes")


def test_a_silent_node_is_named() -> None:
    silent = [state(rank, condition="silent", condition_s=200.0) for rank in (2, 3)]
    verdict = judge([WAITING, WAITING._replace(rank=1), *silent], {})
    assert verdict.guilty == (2, 3)
    assert verdict.message == (
        "hang: node node1, with rank 2, has shown no sign of life for 200 s (and 1 more); ranks 0, 1 wait for it. "
        "Is node1 up, and does it reach the disk of the run?"
    )


def test_ranks_that_nothing_tells_apart_are_not_accused() -> None:
    verdict = judge(four(state(0), state(0)), dict.fromkeys(range(4), BACKWARD))
    assert verdict.guilty == ()
    assert verdict.message == (
        "hang: no rank stands out: ranks 0, 1, 2, 3 are in phase train, without progress for 500 s; see the stacks above. "
        "If this may take so long, raise parallel.hang_minutes"
    )
    two = judge([state(0, waits_for="sum"), state(1, waits_for="barrier")], {})
    assert two.guilty == () and (
        "rank 0 is in phase train, waiting in collective 9 (sum), without progress for 500 s; rank 1 is in phase train, waiting"
        in two.message
    )


def test_of_many_ranks_few_are_listed() -> None:
    states = [state(0, "generate"), *(WAITING._replace(rank=rank) for rank in range(1, 64))]
    assert "; ranks 1, 2, 3, 4, 5, 6, 7, 8 and 55 more wait for it. " in judge(states, {}).message


def test_the_main_thread_is_found() -> None:
    assert main_thread(OWN_CODE).splitlines()[0] == '  File "/x/dapo_mcore/actor/learner.py", line 12 in function'
    assert main_thread(
        'Thread 7 (idle): "MainThread"\n    wait (a.py:1)\nThread 8 (active): "x"\n    run (b.py:2)\n'
    ) == ("    wait (a.py:1)")
    assert main_thread("") == ""
