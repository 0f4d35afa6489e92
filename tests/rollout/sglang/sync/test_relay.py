"""Weights to fake servers on several nodes through relays. Each process is a node: it has servers, and shared memory of its own.

The stream's tensors come from all ranks, beside the buckets that go back to them. NCCL is seen only by the calls made to it.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import signal
import socket
from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dapo_mcore.errors import RolloutError, UpdateBroken
from dapo_mcore.handover import sync_weights
from dapo_mcore.rollout.sglang.engine import SGLangEngine
from dapo_mcore.rollout.sglang.sync import relay, shared_bucket
from dapo_mcore.rollout.sglang.sync.relay import Relay, RelayGroup
from dapo_mcore.rollout.sglang.sync.shared_bucket import SharedBucket
from tests.rollout.sglang.asserts import all_serve, assert_whole
from tests.rollout.sglang.fake_server import fake_python
from tests.rollout.sglang.fake_weights import raw_bytes, views
from tests.rollout.sglang.node_job import CPU, Node, broadcast_object, run_job, started
from tests.rollout.sglang.serving import (
    bucket_a_tensor,
    engine,
    order,
    params,
    prompts,
    servers,
    shared_files,
    states,
    wait_for,
    weights,
)


def test_servers_of_three_nodes_take_the_same_bytes_whatever_fails_and_no_memory_is_left(tmp_path):
    """Four servers of two ranks each, which take turns with the trainer."""
    codes = run_job(all_that_happens, 3, tmp_path)
    assert codes == [0, 0, 0], (tmp_path / "told").read_text()
    told = json.loads((tmp_path / "told").read_text())
    assert told["failed"] == (
        "1 of 2 relays cannot share a bucket: node HOST, rank 1: rollout.sglang.sync tensor needs 0 MiB of shared memory for a "
        "bucket, but /dev/shm has N MiB free (No space left on device); enlarge it (docker run --shm-size), lower "
        "rollout.sglang.bucket_mib, or sync distributed"
    )
    assert told["most files"] == [2, 2], "one bucket is shared and, as servers have two ranks, one may still be read"
    assert told["files left"] == [0, 0], "after each update"
    assert told["updates"] == [5, 5]


def test_memory_of_a_killed_relay_is_deleted(tmp_path):
    """Rank 0 learns of it by its launcher, which ends the job, or after the group's time-out."""
    with started(one_is_killed, 2, tmp_path) as (rank_0, killed):
        killed.join(90)
        assert killed.exitcode == -signal.SIGKILL and (tmp_path / "shared").read_text() == "2"
    for process in (rank_0, killed):
        wait_for(lambda pid=process.pid: not shared_files(pid))


def test_on_gpus_buckets_travel_by_nccl_and_are_there_before_a_handle_is_given(monkeypatch):
    calls: list[Any] = []
    monkeypatch.setattr(dist, "get_rank", lambda: 4)
    monkeypatch.setattr(dist, "new_group", lambda ranks, backend, timeout: calls.append((ranks, timeout)) or backend)
    monkeypatch.setattr(dist, "broadcast", lambda tensor, src, group: calls.append((tensor.numel(), src, group)))
    monkeypatch.setattr(relay.torch, "zeros", lambda *_, **__: torch.empty(1))
    group = RelayGroup([0, 4], torch.device("cuda", 0), timedelta(seconds=9))
    assert calls == [((0, 4), timedelta(seconds=9))] * 2 + [(1, 0, "nccl")]

    order_of_calls: list[str] = []
    bucket = SimpleNamespace(
        data=torch.empty(8),
        wait=lambda: order_of_calls.append("wait"),
        handle=lambda num_openers: order_of_calls.append(f"handle {num_openers}") or "handle",
    )
    monkeypatch.setattr(
        dist, "broadcast", lambda tensor, src, group: order_of_calls.append(f"{group} {tensor.numel()}")
    )
    receiver = Relay(group)
    receiver._next = bucket
    assert receiver._receive(relay.Receive(3)).handle == "handle"
    assert order_of_calls == ["nccl 8", "wait", "handle 3"]


@pytest.mark.parametrize("where", ["stream", "orders"])
def test_an_error_on_a_relays_own_side_is_raised_though_its_other_thread_waits_for_rank_0(monkeypatch, where):
    monkeypatch.setattr(dist, "get_rank", lambda: 4)
    never = multiprocessing.Event()

    def fails() -> None:
        raise RuntimeError(where)

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        yield from [fails() if where == "stream" else never.wait()]

    group = SimpleNamespace(device=CPU, hear=fails if where == "orders" else never.wait)
    with pytest.raises(RuntimeError, match=where):
        Relay(group).serve(stream())
    never.set()


class Trainer:
    """The part of a node that trains. Called, it is a weight stream."""

    def __init__(self, node: Node):
        self.node, self.layout, self.seed = node, node.layout, 0

    def __call__(self, empty: Any = torch.empty, leaders: Any = (0,)) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the weights on rank 0; each rank has every third tensor."""
        for number, (name, tensor) in enumerate(weights(self.seed)):
            holder = number % self.node.size
            if self.node.rank == 0:
                whole = empty(tensor.shape, dtype=tensor.dtype, device=CPU)
                yield name, whole.copy_(tensor.detach()) if holder == 0 else received(whole, holder)
            elif self.node.rank == holder:
                dist.send(tensor.detach(), 0)

    def sync(self, made: SGLangEngine, seed: int, fault: int | None = None) -> None:
        """Bring the weights of `seed` as version `seed`, on rank 0. `fault`  rank whose /dev/shm is full meanwhile."""
        broadcast_object((seed, fault))
        self.seed = seed
        sync_weights(self, made, seed)

    def follow(self) -> dict[str, int]:
        """Take part in every sync, on other ranks. Return what was seen of shared memory."""
        most, left, updates = 0, 0, 0
        add = relay.ReadBuckets.add

        def counted(*arguments: Any) -> SharedBucket:
            nonlocal most
            bucket = add(*arguments)
            most = max(most, len(shared_files()))
            return bucket

        while (told := broadcast_object(None)) is not None:
            self.seed, fault = told
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(relay.ReadBuckets, "add", counted)
                if fault == self.node.rank:
                    patch.setattr(shared_bucket.os, "posix_fallocate", full)
                sync_weights(self, None, 0, self.node.peer)
            left, updates = max(left, len(shared_files())), updates + 1
        return {"most files": most, "files left": left, "updates": updates}


def all_that_happens(node: Node) -> dict[str, Any]:
    trainer = Trainer(node)
    if node.rank:
        return gather(node, trainer.follow())
    python = fake_python(node.folder, "0.5.23")
    place = dict(placement="nodes", host="node", num_servers=4, tensor_parallel=2, colocated=True)
    more = dict(python=python, sync="tensor", verify_sync="servers", restart_budget=99)
    with engine(node.folder, nodes=node.nodes, relays=node.relays, **place, **more) as made:
        assert [server.process.node.rank for server in made.pool.servers] == [0, 1, 2, 0]
        take_turns(trainer, made, 0)
        bucket_a_tensor(made)
        take_turns(trainer, made, 1)

        made.release()
        order(servers(made)[2], "die", where="bucket 5")
        trainer.sync(made, 2)
        assert made.weight_version == 2 and len(made.pool.serving) == 0 and shared_files() == []
        made.resume()
        assert_holds(made, 2, [0, 1, 3])

        wait_for(lambda: states(made)[2] == "waiting", otherwise=made.pool.states.describe)
        made.release()
        with pytest.raises(RolloutError) as failed:
            trainer.sync(made, 3, fault=1)
        assert made.weight_version == 2 and shared_files() == []
        with pytest.raises(UpdateBroken):
            made.resume()
        assert made.weights_lost
        made.release()
        trainer.sync(made, 3)
        made.resume()
        assert_holds(made, 3, [number for number, state in enumerate(states(made)) if state == "serving"])
    broadcast_object(None)
    return gather(node, {}) | {"failed": without_numbers(str(failed.value))}


def take_turns(trainer: Trainer, made: SGLangEngine, seed: int) -> None:
    """Do what handover.py does: training, a sync, generation."""
    made.release()
    trainer.sync(made, seed)
    assert shared_files() == [] and made.weight_version == seed
    made.resume()
    all_serve(made)
    assert_holds(made, seed, range(4))
    asked = prompts(8)
    assert_whole(made.generate(asked, params(8)), asked, 8, version=seed)


def assert_holds(made: SGLangEngine, seed: int, numbers: Any) -> None:
    """Assert that the servers hold these weights bit for bit."""
    expected = {name: hashlib.sha256(raw_bytes(tensor.detach())).hexdigest()[:16] for name, tensor in weights(seed)}
    for number in numbers:
        sums = servers(made)[number].post("/weights_checker")[1]["ranks"][0]["checksums"]
        assert sums == expected, f"server {number}"


def one_is_killed(node: Node) -> None:
    """Rank 1 ends when it is asked for a third bucket, while it shares two."""
    if node.rank:
        prepare = node.peer._prepare
        node.peer._prepare = lambda order: ends(node) if order.table[0].name == "2" else prepare(order)
        node.peer.serve(iter([]))
    for number in range(3):
        shared = SharedBucket.copy_of([(str(number), torch.full((5,), float(number)))])
        handle = node.relays.share(shared, num_read=1, num_openers=1)[1]
        shared.close()
        assert views(handle)[str(number)].tolist() == [number] * 5


def ends(node: Node) -> None:
    (node.folder / "shared").write_text(str(len(shared_files())))
    os.kill(os.getpid(), signal.SIGKILL)


def full(*_: int) -> None:
    raise OSError(28, "No space left on device")


def without_numbers(message: str) -> str:
    """Return the message with the machine's name and free memory replaced."""
    return re.sub(r"has \d+ MiB", "has N MiB", message.replace(socket.gethostname(), "HOST"))


def received(tensor: torch.Tensor, holder: int) -> torch.Tensor:
    dist.recv(tensor, holder)
    return tensor


def gather(node: Node, record: dict[str, int]) -> dict[str, Any]:
    """Return the values of the other ranks' records, on rank 0."""
    records: list[Any] = [None] * node.size
    dist.all_gather_object(records, record)
    node.host.close()
    return {key: [other[key] for other in records[1:]] for key in records[1]}
