"""slime's servers in our words, by hand."""

from __future__ import annotations

from tests.foreign.slime_runs import imported, ours


def test_servers() -> None:
    flags = {"actor-num-nodes": 2, "actor-num-gpus-per-node": 8, "rollout-num-gpus-per-engine": 4}
    found = ours(flags)
    assert (found["rollout.sglang.num_servers"], found["rollout.sglang.tensor_parallel"]) == (4, 4)
    assert (found["rollout.sglang.sync"], found["rollout.sglang.placement"]) == ("tensor", "nodes")
    apart = ours({**flags, "colocate": None, "rollout-num-gpus": 8})
    assert (apart["rollout.sglang.num_servers"], apart["rollout.sglang.sync"]) == (2, "distributed")
    assert set(imported({**flags, "rollout-num-gpus-per-engine": 16}).asked) == {
        "rollout.sglang.tensor_parallel", "rollout.sglang.num_servers",
    }  # fmt: skip
    ahead = imported({"colocate": None, "rollout-num-gpus": 8}, "train_async.py")
    assert ahead.values()["rollout.async_steps"][0] == 1
    assert list(ahead.asked) == ["algo.tis.mode"]


def test_servers_options_and_stops() -> None:
    found = ours(
        {
            "sglang-mem-fraction-static": 0.7,
            "sglang-cuda-graph-bs": [1, 2],
            "rollout-stop": ["x"],
            "rollout-stop-token-ids": [7],
        }
    )
    assert found["rollout.sglang.server_args"] == {"mem-fraction-static": 0.7, "cuda-graph-bs": [1, 2]}
    assert found["rollout.stop"] == ["x", 7]


def test_whose_gpus_servers_take() -> None:
    assert ours({"rollout-num-gpus": 4})["rollout.sglang.num_servers"] == 4, (
        "an explicit number holds with colocate, too"
    )
    for unknown in ({"rollout-num-gpus": 16}, {"colocate": None}, {"rollout-num-gpus": 0}):
        assert "rollout.sglang.num_servers" in imported(unknown).asked
    assert "rollout.sglang.tensor_parallel" in imported({"sglang-pp-size": 2, "rollout-num-gpus-per-engine": 4}).asked


def test_options_of_slimes_own_client_and_router_are_none_of_the_servers() -> None:
    flags = {
        "sglang-server-concurrency": 64,
        "sglang-router-port": 3000,
        "sglang-mem-fraction-static": 0.7,
        "sglang-dtype": "half",
    }
    found = ours(flags)
    assert found["rollout.sglang.server_args"] == {"mem-fraction-static": 0.7}
    assert found["rollout.sglang.max_in_flight"] == 64
    assert imported({"sglang-config": "servers.yaml"}).losses["sglang-config"] is False
