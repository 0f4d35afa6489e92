"""Servers and reward workers over two nodes of one Ray cluster (each a raylet of its own), and the loss of a node.

The configuration is that of a real cluster: an address, and each node's own interface.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from dapo_mcore.reward.ray_pool import RayRewardPool
from tests.reward.test_ray_pool import ZOO, attempts
from tests.rollout.serving import engine, params, prompts, weights
from tests.rollout.test_sglang import all_serve, assert_whole, servers, told

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="pip install 'dapo_mcore[ray]'")


@pytest.fixture
def cluster() -> Iterator[Any]:
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", os.urandom(32).hex())
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args=dict(num_cpus=2, include_dashboard=False))
    yield made
    made.shutdown()


def nodes_of(actors: list[Any]) -> set[str]:
    import ray

    where = ray._private.state.state.actor_table
    return {where(actor._actor_id.hex())["Address"]["NodeID"] for actor in actors}


def test_both_are_spread_over_nodes_and_outlive_the_loss_of_one(cluster, tmp_path):
    second = cluster.add_node(num_cpus=2)
    given = dict(placement="ray", ray_address=cluster.address, host="node", num_servers=2)
    with engine(tmp_path, **given) as made:
        rewards = RayRewardPool(2, f"{ZOO}:by_text", "verl", False, 10.0, cluster.address)
        assert len(nodes_of([process._actor for process in made._processes])) == 2
        assert len(nodes_of(rewards._actors)) == 2
        made.update_weights(weights(0), version=1)
        asked = prompts(20)
        assert_whole(made.generate(asked, params(16)), asked, 16, version=1)

        cluster.add_node(num_cpus=2)
        cluster.remove_node(second, allow_graceful=False)
        assert_whole(made.generate(asked, params(16)), asked, 16, version=1)
        assert [outcome.score for outcome in rewards.score(attempts(*["score 2"] * 20))] == [2.0] * 20
        all_serve(made)
        assert {told(server)["weight_version"] for server in servers(made)} == {made._tag}
        assert made.metrics()["rollout/server_restarts"] == 1
        rewards.close()
