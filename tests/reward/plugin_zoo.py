"""Reward functions for tests: good ones in both conventions, and ones that fail in every way."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from dataclasses import dataclass


class FunctionTimedOut(BaseException):
    """The package func_timeout raises such an error: it is no Exception."""


class TextlessError(Exception):
    def __str__(self):
        raise ValueError("no text")


@dataclass
class Held:
    """Dataclasses must work in a file that is loaded by its path."""

    score: float = 0.5


def half(data_source, solution_str, ground_truth, extra_info=None):
    return Held().score


def exact(data_source, solution_str, ground_truth, extra_info):
    right = solution_str == ground_truth
    return {"score": 2.0 if right else -0.5, "acc": right, "pred": solution_str, "anything": object}


def echo(data_source, solution_str, ground_truth, extra_info):
    return {"score": 1, "pred": f"{data_source}|{solution_str}|{ground_truth}|{extra_info}"}


def length(data_source, solution_str, ground_truth, extra_info):
    return len(solution_str)


def by_text(data_source, solution_str, ground_truth, extra_info):
    """Do what the response says."""
    word, _, value = solution_str.partition(" ")
    if word == "spin":
        while True:
            pass
    if word == "sleep":
        time.sleep(float(value))
    if word == "raise":
        raise ValueError(value)
    if word == "exit":
        os._exit(int(value))
    if word == "leave":
        sys.exit(int(value))
    if word == "interrupt":
        raise KeyboardInterrupt
    if word == "out-of-time":
        raise FunctionTimedOut("scoring took 5 s")
    if word == "cancel":
        asyncio.run(cancelled())
    if word == "textless":
        raise TextlessError
    if word == "essay":
        raise ValueError("word\n" * 1000)
    if word == "score":
        return float(value)
    if word == "niceness":
        return {"score": 1.0, "pred": os.nice(0)}
    if word == "hang-once":  # the first time, until the parent process is gone; the file `value` marks that it happened
        parent, first = os.getppid(), not os.path.exists(value)
        open(value, "a").close()
        while first and os.getppid() == parent:
            time.sleep(0.05)
    if word == "none":
        return None
    if word == "text":
        return "1.0"
    if word == "empty":
        return {"acc": True}
    if word == "pid":
        return {"score": 1.0, "pred": os.getpid()}
    return 1.0


async def cancelled():
    task = asyncio.ensure_future(asyncio.sleep(60))
    task.cancel()
    await task


LOOPS = []


async def awaited(data_source, solution_str, ground_truth, extra_info=None):
    """Return a right answer if every call runs in the same event loop, as a client needs."""
    await asyncio.sleep(0)
    LOOPS.append(asyncio.get_running_loop())
    return {"score": 1.0, "acc": LOOPS[0] is LOOPS[-1]}


def of_transcript(data_source, solution_str, ground_truth, extra_info, transcript):
    calls = ["{name}({arguments}): {kind}: {output}".format(**call) for call in transcript["calls"]]
    told = f"{transcript['num_turns']} turns: {'|'.join(transcript['turns'])}; {', '.join(calls)}"
    return {"score": extra_info["num_turns"], "pred": f"{os.getpid()} {told}"}


def without_extra(data_source, solution_str, ground_truth):
    return 1.0


def with_more(data_source, solution_str, ground_truth, extra_info, temperature):
    return temperature


def anything(**kwargs):
    return float(len(kwargs))


def trl_length(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def trl_named(completions, answer, level):
    return [1.0 if c == a and n == 3 else 0.0 for c, a, n in zip(completions, answer, level)]


def trl_two(completions):
    return [1.0, 2.0]


not_a_function = 3


def trl_repr(prompts, completions, completion_ids, **columns):
    TRL_SEEN.append((prompts, completions, completion_ids, columns))
    return [1.0]


TRL_SEEN = []


async def trl_skip(completions, trainer_state=None, **kwargs):
    """TRL's way to leave a sample out."""
    return [None]


def trl_schedule(completions, trainer_state, log_metric, **kwargs):
    return [trainer_state.global_step]


def trl_accuracy(completions: list[list[dict[str, str]]], solution: list[str], log_extra=None, **kwargs):
    """The shape of TRL's accuracy_reward."""
    contents = [completion[0]["content"] for completion in completions]
    return [float(text.endswith(truth)) for text, truth in zip(contents, solution, strict=True)]
