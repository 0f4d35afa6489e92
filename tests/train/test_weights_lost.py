"""Whole runs whose only server dies during generation. It comes back without weights, and the run continues.

In "distributed" both pipeline stages send their weights.
"""

from __future__ import annotations

import json

import pytest

from tests.train.runs import metrics
from tests.train.served import run_served, trained

PIPELINE = ["parallel.tensor_parallel=1", "parallel.pipeline_parallel=2"]
WAYS = {
    "distributed": ["rollout.async_steps=0", "rollout.sglang.sync=distributed", *PIPELINE],
    "colocated": ["rollout.async_steps=0", "rollout.sglang.colocated=true", "rollout.sglang.sync=tensor"],
    "ahead": ["rollout.async_steps=1", "rollout.sglang.sync=distributed"],
}


@pytest.mark.parametrize("name", WAYS)
def test_the_step_waits_for_another_sync_and_loses_no_prompt(task, fake, name):
    faults = task / "faults.json"  # in the second step: each step asks for at least 16 responses
    faults.write_text(json.dumps([{"kind": "die", "where": "/generate", "after": 30}]))
    options = [*WAYS[name], "num_rollout_steps=3", "sampling.style=none", "batch.mini_batch_prompts=4"]
    done = run_served(task, fake, name, *options, processes=2, FAKE_FAULTS=str(faults))
    assert done.returncode == 0, done.stdout + done.stderr
    assert not faults.exists()
    told = [line for line in done.stdout.splitlines() if line.startswith("rollout server ")]
    expected = (" is out: ", " is started again", "well again", "serves again")
    assert len(told) == 4 and all(part in line for part, line in zip(expected, told, strict=True)), told
    rows, steps = metrics(task, name), trained(task, name)
    assert sum(row["sync/weights_lost"] for row in rows) <= 1
    assert sum(row["rollout/server_restarts"] for row in rows) == 1
    assert sum(row["rollout/retries"] for row in rows) > 0
    assert [row["step"] for row in rows] == [1, 2, 3] and [len(groups) for groups in steps.values()] == [4, 4, 4]
    assert len({uid for groups in steps.values() for uid in groups}) == 12, "every prompt once"
    assert all(row["rollout/dropped_unknown_version"] == row["sampling/groups_stale"] == 0 for row in rows)
    if name != "ahead":  # with async_steps the next sync may come first
        assert sum(row["sync/weights_lost"] for row in rows) == 1
        assert [max(groups.values()) for groups in steps.values()] == [0, 1, 2]
