"""Program of test_replay.py: commands one after the other in one process, since importing takes longer than a run.

Reads JSON from standard input: [[program, arguments], …], where the program is `train`, `replay`, or `flipped`: a replay with one
bit of a loaded weight changed. Writes the statuses and outputs.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys

import torch

from dapo_mcore.cli import main as tool
from dapo_mcore.train.__main__ import main as train


def flipped(arguments: list[str]) -> int:
    from dapo_mcore.replay import replay

    load = replay.load_checkpoint

    def load_and_flip(path, actor, layout):
        state = load(path, actor, layout)
        weight = actor.policy[0].get_parameter("decoder.layers.1.mlp.linear_fc2.weight")
        weight.data.view(-1).view(torch.int32)[7] ^= 1
        return state

    replay.load_checkpoint = load_and_flip
    try:
        return tool(["replay", *arguments])
    finally:
        replay.load_checkpoint = load


PROGRAMS = {"train": train, "replay": lambda arguments: tool(["replay", *arguments]), "flipped": flipped}

if __name__ == "__main__":
    results = []
    for program, arguments in json.load(sys.stdin):
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            status = PROGRAMS[program](arguments)
        results.append([status, output.getvalue()])
    print("RESULTS" + json.dumps(results))
