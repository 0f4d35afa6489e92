"""Steps of a weight update, and checksums: servers that confirm an update but hold other bytes are found and taken out.

Before 0.5.23 a real server without CUDA reports no checksums. With its one call of CUDA stubbed it reports those of CPU tensors,
so the form of the answer is tested on both the fake and the real server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import save_file

from dapo_mcore.errors import RolloutError
from dapo_mcore.process.loop_thread import LoopThread
from dapo_mcore.rollout.sglang.client.api import ServerClient
from dapo_mcore.rollout.sglang.client.http import HttpClient
from dapo_mcore.rollout.sglang.pool.server import GENERATING, Server, ServerStates
from dapo_mcore.rollout.sglang.pool.update import PoolWeights, Transaction, Updates
from tests.rollout.sglang.asserts import all_serve, assert_whole
from tests.rollout.sglang.fake_server import fake_python
from tests.rollout.sglang.serving import (
    Raw,
    bare_server,
    engine,
    order,
    params,
    pool_settings,
    prompts,
    real_python,
    servers,
    states,
    told,
    wait_for,
    weights,
)

NUM_TENSORS = len(list(weights(0)))
LOAD = "weight update, load"
KINDS = ["0.5.21", "0.5.23", pytest.param("real", marks=pytest.mark.sglang)]


def with_cuda_stubbed(python: Path, folder: Path) -> Path:
    """Return an interpreter whose torch.cuda.synchronize does nothing."""
    stub = "import torch\ntorch.cuda.synchronize = lambda *_: None\n"
    (folder / "sitecustomize.py").write_text(stub)
    script = folder / "python-stubbed"
    # -P removes the working directory from the path, but not PYTHONPATH
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}" exec "{python}" "$@"\n')
    script.chmod(0o755)
    return script


@pytest.fixture(scope="module", params=KINDS)
def server(request, tmp_path_factory) -> Iterator[Raw]:
    folder = tmp_path_factory.mktemp(request.param)
    real = request.param == "real"
    python = with_cuda_stubbed(real_python(), folder) if real else fake_python(folder, request.param, checksums=True)
    with bare_server(python, folder / "servers") as raw:
        yield raw


def checksums(server: Raw) -> dict[str, str] | None:
    """Return the server's checksums as the engine reads them."""
    loop = LoopThread("test")

    async def ask() -> dict[str, str] | None:
        http = HttpClient(10.0, 10.0)
        try:
            return await ServerClient(http, server.url, server.keys, 60.0).weights_checker()
        finally:
            await http.close()

    try:
        return loop.run(ask())
    finally:
        loop.close()


def test_checksums_follow_the_weights_of_every_parameter(server: Raw, tmp_path) -> None:
    seen = []
    for seed in (1, 2, 1):
        folder = tmp_path / f"{len(seen)}"
        folder.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in weights(seed)}, folder / "0.safetensors")
        body = {"model_path": str(folder), "load_format": "safetensors", "weight_version": f"{len(seen)}"}
        assert server.post("/update_weights_from_disk", body)[0] == 200
        seen.append(checksums(server))
    first, second, again = seen
    assert first == again and first.keys() == second.keys() and len(first) >= 15
    matrices = [
        name for name in first if "norm" not in name and "bias" not in name
    ]  # others are equal in every tiny model
    assert "0:model.embed_tokens.weight" in matrices and all(first[name] != second[name] for name in matrices)
    assert server.post("/weights_checker", {"action": "checksum"}, key="api")[0] == 401


@pytest.mark.parametrize(("version", "tells"), [("0.5.21", False), ("0.5.23", True)])
def test_a_server_without_cuda_reports_checksums_from_0_5_23_on(version: str, tells: bool, tmp_path) -> None:
    with bare_server(fake_python(tmp_path, version), tmp_path / "servers") as raw:
        assert (checksums(raw) is not None) == tells


def verified(folder: Path, **changes):
    return engine(folder, python=fake_python(folder, checksums=True), verify_sync="servers", **changes)


def test_one_server_of_three_with_other_weights_is_taken_out_until_it_agrees(tmp_path):
    with verified(tmp_path, num_servers=3) as made:
        made.update_weights(weights(0), version=1)
        assert made.metrics()["sync/servers_verified"] == 3
        wrong = servers(made)[1]
        order(wrong, "flip", where="weights", count=2)  # the first reload is wrong, too
        made.update_weights(weights(1), version=2)
        assert states(made)[::2] == ["serving", "serving"]
        wait_for(lambda: f"differs in 1 of {NUM_TENSORS} weights" in made.pool.servers[1].problem)
        asked = prompts(30)
        assert_whole(made.generate(asked, params(8)), asked, 8, version=2)
        all_serve(made)
        assert told(wrong)["weights"] == pytest.approx(told(servers(made)[0])["weights"])
        assert made.metrics()["rollout/servers_excluded"] == 2


def test_two_servers_that_differ_both_reload_the_weights(tmp_path):
    with verified(tmp_path, num_servers=2) as made:
        order(servers(made)[0], "flip", where="weights")
        made.update_weights(weights(1), version=1)
        all_serve(made)
        assert told(servers(made)[0])["weights"] == pytest.approx(told(servers(made)[1])["weights"])
        assert made.metrics()["rollout/servers_excluded"] == 2


def test_a_single_server_must_repeat_its_checksums_after_a_reload(tmp_path):
    with verified(tmp_path) as made:
        made.update_weights(weights(0), version=1)
        assert made.metrics()["sync/servers_verified"] == 0
        (server,) = servers(made)
        order(server, "flip", where="weights")
        order(server, "edit", value={"weight_version": "default", "weight_versions": None})
        made.generate(prompts(1), params(8))
        all_serve(made)
        numbers = made.metrics()
        assert numbers["rollout/servers_excluded"] == 1 and numbers["rollout/servers_resynced"] == 1


def test_restarts_for_a_step_are_forgotten_once_it_goes_well():
    server = Server(SimpleNamespace(url="http://a:1"), state="serving")

    async def succeed(_: Server) -> None: ...

    async def fail(_: Server) -> None:
        raise RolloutError("no")

    async def run() -> None:
        taken_out: list[str] = []
        recovery = SimpleNamespace(take_out=lambda server, problem, failed_at: taken_out.append(failed_at))
        transaction = Transaction([server], "1", 1.0, recovery)
        for step, action, left in (("open", succeed, (LOAD, 2)), ("load", succeed, ("", 0)), ("load", fail, (LOAD, 2))):
            server.restarts = (LOAD, 2)
            await transaction.each(step, action)
            assert server.restarts == left
        assert taken_out == [LOAD]
        server.restarts = (GENERATING, 2)
        updates = Updates(ServerStates([server], print), PoolWeights(), pool_settings(), recovery, None)
        updates.transaction("2")  # the server has generated from the last update to this one
        assert server.restarts == ("", 0)

    asyncio.run(run())
