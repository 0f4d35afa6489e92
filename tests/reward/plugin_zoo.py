"""Reward functions for tests: good ones in both conventions, and every way to misbehave."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass


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


def by_text(data_source, solution_str, ground_truth, extra_info):
    """Does what the response says."""
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
    if word == "score":
        return float(value)
    if word == "niceness":
        return {"score": 1.0, "pred": os.nice(0)}
    if word == "hang-once":  # until the process that asked is gone; `value` is a file that remembers
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


def trl_length(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def trl_named(completions, answer, level):
    return [1.0 if c == a and n == 3 else 0.0 for c, a, n in zip(completions, answer, level)]


def trl_two(completions):
    return [1.0, 2.0]


not_a_function = 3
