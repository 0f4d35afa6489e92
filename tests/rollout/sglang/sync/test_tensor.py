"""Weights through shared memory: what servers read, how long it stays, and which servers are refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace

import pytest
import torch

from dapo_mcore.architecture.manifest import buckets
from dapo_mcore.errors import ConfigError, RolloutError
from dapo_mcore.rollout.sglang.engine import SGLangEngine
from dapo_mcore.rollout.sglang.pool.server import Server
from dapo_mcore.rollout.sglang.pool.update import Transaction
from dapo_mcore.rollout.sglang.sync.tensor import Handles, TensorSender
from dapo_mcore.rollout.sglang.sync.weight_format import quantized
from tests.rollout.sglang.asserts import assert_an_error_where_memory_cannot_be_opened, assert_whole
from tests.rollout.sglang.fake_server import fake_python
from tests.rollout.sglang.fake_weights import views
from tests.rollout.sglang.serving import (
    STOP,
    bucket_a_tensor,
    engine,
    gathered,
    order,
    params,
    prompts,
    servers,
    settings,
    shared_files,
    states,
    tiny_config,
    told,
    wait_for,
    weights,
)


def sums(stream: Iterator[tuple[str, torch.Tensor]]) -> dict[str, float]:
    return {name: tensor.float().sum().item() for name, tensor in stream}


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_every_rank_takes_every_tensor_in_many_buckets_and_no_memory_is_left(tmp_path, tensor_parallel):
    with engine(tmp_path, num_servers=2, sync="tensor", tensor_parallel=tensor_parallel) as made:
        made.update_weights(weights(1), version=0)
        bucket_a_tensor(made)
        made.update_weights(weights(2), version=1)
        for server in servers(made):
            now = told(server)
            assert now["weight_version"] == made.pool.weight_version and not now["session"]
            assert now["counts"]["buckets"] == 1 + len(list(weights(2)))
            assert now["weights"] == pytest.approx(sums(weights(2)), rel=1e-4, abs=1e-4)
        numbers = made.metrics()
        assert numbers["sync/bytes"] == sum(tensor.nbytes for _, tensor in weights(0))
        assert numbers["sync/tensor_s"] > 0 and numbers["sync/gb_per_s"] > 0
        assert shared_files() == []
        made.update_weights(gathered(made, 3), version=1)
        assert all(told(s)["weights"] == pytest.approx(sums(weights(3)), rel=1e-4, abs=1e-4) for s in servers(made))
        assert shared_files() == []
        asked = prompts(3)
        assert_whole(made.generate(asked, params(8)), asked, 8, version=1)


@pytest.mark.parametrize("version", ["0.5.15", "0.5.20"])
def test_servers_of_versions_without_sessions_work(tmp_path, version):
    with engine(tmp_path, python=fake_python(tmp_path, version), sync="tensor") as made:
        made.update_weights(weights(0), version=1)
        assert told(servers(made)[0])["weights"] == pytest.approx(sums(weights(0)), rel=1e-4, abs=1e-4)


def test_servers_take_the_fp8_stream(tmp_path):
    given = settings(fake_python(tmp_path), sync="tensor", quantize="fp8")
    made = SGLangEngine(given, tiny_config(), stop_token_ids=(STOP,), dtype=torch.bfloat16, folder=tmp_path / "servers")
    try:
        made.update_weights(((name, tensor.bfloat16()) for name, tensor in weights(3)), version=1)
        expected = sums(quantized((name, tensor.bfloat16()) for name, tensor in weights(3)))
        assert any(name.endswith("_scale_inv") for name in expected)
        assert told(servers(made)[0])["weights"] == pytest.approx(expected, rel=1e-3, abs=1e-3)
    finally:
        made.close()


@pytest.mark.parametrize(("where", "delta"), [("bucket 1", False), ("bucket 5", False), ("bucket 1", True)])
def test_a_server_that_dies_at_a_bucket_is_left_out_and_the_others_go_on(tmp_path, where, delta):
    with engine(tmp_path, num_servers=2, sync="tensor", delta=delta) as made:
        bucket_a_tensor(made)
        made.update_weights(weights(0), version=1)
        first, second = servers(made)
        order(first, "die", where=where)
        made.update_weights(weights(1), version=2)
        assert shared_files() == []
        asked = prompts(10)
        assert_whole(made.generate(asked, params(16)), asked, 16, version=2)
        wait_for(lambda: states(made) == ["waiting", "serving"])
        made.update_weights(weights(3), version=3)
        assert len(made.pool.serving) == 2 and shared_files() == []
        assert told(first)["weights"] == pytest.approx(told(second)["weights"])


def test_the_error_of_servers_that_cannot_open_the_memory_has_the_remedy(tmp_path, monkeypatch):
    with engine(tmp_path, sync="tensor", restart_budget=0) as made:
        assert_an_error_where_memory_cannot_be_opened(made, monkeypatch)


@pytest.mark.parametrize("delta", [False, True])
def test_a_stream_that_breaks_off_leaves_no_memory_and_the_next_one_is_taken(tmp_path, delta):
    with engine(tmp_path, sync="tensor", delta=delta) as made:
        bucket_a_tensor(made)
        made.update_weights(weights(0), version=1)
        whole = list(weights(1))
        with pytest.raises(RolloutError, match="lacks 1 of"):
            made.update_weights(iter(whole[:-1]), version=2)
        assert made.weight_version == 1 and shared_files() == []
        wait_for(lambda: states(made) == ["waiting"])
        made.update_weights(iter(whole), version=2)
        assert told(servers(made)[0])["weights"] == pytest.approx(sums(iter(whole)), rel=1e-4, abs=1e-4)


async def no_buckets() -> AsyncIterator[tuple[Handles, str | None]]:
    for nothing in ():
        yield nothing


@pytest.mark.parametrize("num_read", [0, 1])
def test_a_bucket_stays_as_it_is_until_no_rank_reads_it(num_read):
    """The answer to a bucket shows that one rank has copied it. The answer to the next one shows it for every rank."""
    sender, before = TensorSender([], 0), None
    pool = [Server(SimpleNamespace(url="http://a:1"), num_ranks=1 + num_read)]
    asyncio.run(sender.send(Transaction([], "1", 1.0, SimpleNamespace(), pool=pool), no_buckets()))
    for number, (bucket, _) in enumerate(buckets(weights(0), 0)):
        tensors = list(bucket)
        handle = sender.pack(bucket)[0]
        assert len(shared_files()) == min(number, num_read) + 1
        for expected, found in [(tensors, handle)] + ([before] if before and num_read else []):
            for (name, tensor), (opened_name, opened_tensor) in zip(expected, views(found).items(), strict=True):
                assert name == opened_name and torch.equal(tensor, opened_tensor)
        before = tensors, handle
    sender.close()
    assert shared_files() == []


def tensors_to_gather(sender: TensorSender) -> dict[str, torch.Tensor]:
    """Return two tensors, one larger than a bucket and one not. Each lacks the last row of its memory."""
    sizes = {"large": (33, 8), "small": (32, 8)}
    made = {name: sender.empty(s, dtype=torch.float32, device=torch.device("cpu")) for name, s in sizes.items()}
    return {name: tensor.fill_(2.0)[:-1] for name, tensor in made.items()}


def test_a_tensor_larger_than_a_bucket_is_shared_where_it_was_gathered():
    sender = TensorSender([], bucket_bytes=32 * 8 * 4)
    tensors = tensors_to_gather(sender)
    (file,) = shared_files()
    for name, is_in_place in {"large": True, "small": False}.items():
        handle = sender.pack([(name, tensors[name])])[0]
        assert (shared_files() == [file]) == is_in_place and len(shared_files()) == 1
        ours = tensors.pop(name).fill_(3.0)  # shows in the bucket only if the bucket is not a copy
        ((found, tensor),) = views(handle).items()
        assert found == name and tensor.shape == ours.shape and tensor.eq(3.0 if is_in_place else 2.0).all()
        del ours
        sender.close()
    assert shared_files() == []


def test_memory_of_a_tensor_that_is_never_sent_is_freed_with_it():
    sender = TensorSender([], bucket_bytes=32 * 8 * 4)
    tensors = tensors_to_gather(sender)
    assert len(shared_files()) == 1
    del tensors["large"]
    assert shared_files() == [], "the sender keeps no reference either"


def test_a_full_dev_shm_does_not_stop_the_gather_but_the_sharing(full_dev_shm):
    """Other ranks take part in the gather, so it must not stop. The error comes when the tensor is shared."""
    sender = TensorSender([], bucket_bytes=32 * 8 * 4)
    tensors = tensors_to_gather(sender)
    assert shared_files() == [] and tensors["large"].eq(2.0).all()
    with pytest.raises(RolloutError, match="shared memory for a bucket"):
        sender.pack([("large", tensors["large"])])
    assert shared_files() == []


def test_servers_on_other_machines_are_refused_at_the_start():
    urls = ["http://127.0.0.1:30000", "http://localhost:30001", "http://[::1]:30002"]
    TensorSender(urls, 0)
    far = "http://192.0.2.7:30000"
    with pytest.raises(
        ConfigError, match=rf"1 of 4 servers are not at an address of it: {far}; .* or sync distributed"
    ):
        TensorSender([*urls, far], 0)
