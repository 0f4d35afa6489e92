"""Leaders of the weight stream in real processes (a mixture of experts on TP2·PP2·EP2), and fake servers that take opposite times."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from dapo_mcore.train.leaders import sender_address
from tests.actor import families
from tests.actor.parity import Mesh, make_config, spawn
from tests.rollout.sglang.fake_server import fake_python
from tests.rollout.sglang.serving import order, servers, settings, states, told

UPDATE = "/update_weights_from_distributed"


def test_the_leaders_of_both_stages_give_servers_every_tensor_and_survive_faults(tmp_path: Path) -> None:
    problem = families.save_problem("qwen2-moe", tmp_path)
    found = spawn(sync_from_leaders, Mesh(tensor=2, sequence_parallel=True, pipeline=2, expert=2), str(problem))
    assert found["leaders"] == [0, 2]
    assert found["lines"] == []
    assert found["groups"] == [2, 2], "one from each leader"
    assert found["different"] == {"whole": [], "after a death": []}
    assert found["repeats"] == {"whole": 0.0, "after a death": 1.0}
    assert found["bytes"] == {"whole": found["model"], "after a death": found["model"]}
    assert found["survivors"] == [True, False]
    assert "came twice" in found["refused"] and found["version"] == 2
    assert found["after a mistake"] == [False, False], "a server with half an update is discarded"
    assert "rank 0 sends all weights alone" in found["alone"][0] and "http://127.0.0.1:1" in found["alone"][0]


def sync_from_leaders(layout: Any, mesh: Mesh, path: str) -> dict[str, Any]:
    """Worker: syncs from two leaders to two servers that wait by turns; one server dies; one leader sends a tensor twice."""
    from dapo_mcore.actor.model.policy import build_policy
    from dapo_mcore.actor.weight_stream import WeightStream
    from dapo_mcore.architecture.shape import weight_shape
    from dapo_mcore.errors import RolloutError
    from dapo_mcore.handover import sync_weights
    from dapo_mcore.rollout.sglang.engine import SGLangEngine
    from dapo_mcore.train.leaders import open_leaders

    problem = families.load_problem(path)
    policy = build_policy(make_config(mesh), problem.hf_config, layout)
    families.fill(policy, problem, layout)
    folder = Path(tempfile.mkdtemp(dir=Path(path).parent))
    more = dict(num_servers=2, sync="distributed", restart_budget=0, sync_timeout_s=60.0, bucket_mib=1)
    config = make_config(mesh)
    given = settings(fake_python(folder), **more) if layout.is_controller else None
    given = layout.broadcast_object(given)
    config = config.model_copy(
        update={"rollout": config.rollout.model_copy(update={"engine": "sglang", "sglang": given})}
    )
    engine = None
    if layout.is_controller:
        common = dict(stop_token_ids=(1,), dtype=torch.float32, folder=folder / "servers")
        engine = SGLangEngine(given, problem.hf_config, **common)
        engine.bucket_bytes = 0
    lines: list[str] = []
    leaders, peer = open_leaders(config, problem.hf_config, layout, engine, lines.append)
    if peer is not None:
        peer._bucket_bytes = 0
    stream = WeightStream(policy, weight_shape(problem.hf_config, layout.tensor), layout)
    found: dict[str, Any] = {"leaders": leaders, "lines": lines, "different": {}, "repeats": {}, "bytes": {}}

    def sync(case: str, version: int) -> None:
        sync_weights(stream, engine, version, peer, leaders)
        if engine is not None:
            held = told(servers(engine)[0])["weights"]
            sums = {name: float(tensor.float().sum()) for name, tensor in problem.weights.items()}
            wrong = [name for name in sums if held.get(name) != pytest.approx(sums[name], rel=1e-4, abs=1e-4)]
            metrics = engine.metrics()
            found["different"][case], found["repeats"][case] = wrong, metrics["sync/repeats"]
            found["bytes"][case] = metrics["sync/bytes"]

    if engine is not None:
        for number, server in enumerate(servers(engine)):
            for after in range(number, 12, 2):
                order(server, "wait", where=UPDATE, value=0.2, after=after)
                order(server, "wait", where="/init_weights_update_group", value=0.2, after=after)
    sync("whole", 1)
    if engine is not None:
        found["groups"] = [len(told(server)["groups"]) for server in servers(engine)]
        order(servers(engine)[1], "die", where="bucket 20")
    sync("after a death", 2)
    if engine is not None:
        found["survivors"] = [state == "serving" for state in states(engine)]

    def twice(*_: Any, **__: Any) -> Any:
        for name, tensor in stream(leaders=leaders):
            yield name, tensor
            if layout.rank == 2:
                yield name, tensor

    twice.layout = layout
    try:
        sync_weights(twice, engine, 3, peer, leaders)
    except RolloutError as error:
        found["refused"] = str(error)
    layout.barrier()
    if engine is not None:
        found["version"] = engine.weight_version
        found["after a mistake"] = [state == "serving" for state in states(engine)]
        found["model"] = float(sum(tensor.nbytes for tensor in problem.weights.values()))
        engine.pool.servers[0].client.url, url = "http://127.0.0.1:1", engine.pool.servers[0].url
    alone, nobody = open_leaders(config, problem.hf_config, layout, engine, lines.append)
    assert alone == (0,) and nobody is None
    if engine is not None:
        engine.pool.servers[0].client.url = url
        found["alone"], found["lines"] = lines, []
        engine.close()
    layout.barrier()
    if peer is not None:
        peer.close()
    return found


def test_senders_elsewhere_use_their_address_on_the_way_to_rank_0s_machine() -> None:
    assert sender_address("10.1.2.3", {"GROUP_RANK": "0"}) == "10.1.2.3"
    assert sender_address("127.0.0.2", {"GROUP_RANK": "1", "MASTER_ADDR": "127.0.0.1"}) == "127.0.0.1"
