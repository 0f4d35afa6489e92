"""A whole run as users start it, with a real SGLang server and a Megatron actor on two processes (TP2, gloo)."""

from __future__ import annotations

import json

import pytest

from tests.rollout.sglang.serving import real_python
from tests.train.runs import metrics, run, run_on_two_nodes

STEPS = 3
NODES = [f"rollout.sglang.{key}" for key in ("placement=nodes", "host=node", "num_servers=2")]
PIPELINE = ["parallel.tensor_parallel=1", "parallel.pipeline_parallel=2"]


@pytest.mark.sglang
@pytest.mark.parametrize(
    "name, num_servers, options",
    [
        # the runs on a real server in test_async.py and test_keep.py sync by disk, too
        pytest.param("disk", 1, ["rollout.sglang.sync=disk"], marks=pytest.mark.slow),
        # both pipeline stages send
        ("distributed", 1, ["rollout.sglang.sync=distributed", *PIPELINE]),
        # one on each node, so one of them gets its weights from a relay
        ("colocated", 2, ["rollout.sglang.colocated=true", "rollout.sglang.sync=tensor", "checkpoint.every=2", *NODES]),
    ],
)
def test_in_three_steps_a_real_server_follows_every_update(task, name, num_servers, options):
    server = ["rollout.engine=sglang", "rollout.sglang.device=cpu", f"rollout.sglang.python={real_python()}"]
    arguments = [*server, *options, f"num_rollout_steps={STEPS}", "eval.every=3"]
    if num_servers == 1:
        run(task, name, *arguments, processes=2)
    else:
        run_on_two_nodes(task, name, *arguments)
    folder = task / "runs" / name
    rows = metrics(task, name)
    assert [row["step"] for row in rows] == [*range(STEPS + 1)]
    assert rows[0]["val/heldout/mean@2"] >= 0 and rows[STEPS]["val/heldout/mean@2"] >= 0
    for row in rows[1:]:
        # after each update the server's log-probs are the actor's: the weights arrived
        assert row["mismatch/logprob_diff_max"] < 1e-4, row
        assert row["actor/first_update_ratio_deviation"] == 0.0
        assert row["actor/grad_norm"] > 0
        assert row["rollout/servers_serving"] == num_servers and row["rollout/retries"] == 0
        assert row["sync/bytes"] == 4 * 125_504
    assert rows[STEPS]["updates"] == 2 * STEPS
    versions = [
        json.loads(line)["weight_version"]
        for file in sorted((folder / "samples").glob("*.jsonl"))
        for line in file.open()
    ]
    assert sorted(set(versions)) == [0, 1, 2]
    assert ("sync/handover_s" in rows[1]) == (name == "colocated")
    assert (folder / "hf/final/model.safetensors").exists() and (folder / "servers/keys.json").exists()
