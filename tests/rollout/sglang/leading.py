"""A second leader of the weight stream for tests of one process: it sends its part from a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import torch

from dapo_mcore.rollout.sglang.engine import SGLangEngine
from dapo_mcore.rollout.sglang.sync.leader import Leader
from dapo_mcore.rollout.sglang.sync.parts import OtherLeaders

TOKEN = "b" * 64
NUM_FIRST = 2
"""Tensors that rank 0 sends itself: the buckets from number 3 on come from the second leader if each holds one tensor."""
Weights = Iterator[tuple[str, torch.Tensor]]


def new_leader(timeout_s: float, bucket_bytes: int = 0, as_served: Callable[[Weights], Weights] = iter) -> Leader:
    cpu = torch.device("cpu")
    more = dict(bucket_bytes=bucket_bytes, timeout_s=timeout_s, patience_s=60.0)
    return Leader("127.0.0.1", TOKEN, backend="gloo", device=cpu, as_served=as_served, **more)


@contextmanager
def second_leader(made: SGLangEngine, timeout_s: float = 30.0) -> Iterator[Leader]:
    """Let every `made.update_weights` send all but the first NUM_FIRST tensors from another leader in the block."""
    leader, alone = new_leader(timeout_s), made.update_weights
    made.lead(OtherLeaders([leader.url], TOKEN, timeout_s))

    def update(weights: Weights, version: int) -> None:
        update_in_parts(made, leader, alone, list(weights), version)

    made.update_weights = update
    try:
        yield leader
    finally:
        made.close()  # while the leader still answers
        leader.close()


def update_in_parts(
    made: SGLangEngine, leader: Leader, update: Any, weights: list[tuple[str, torch.Tensor]], version: int
) -> None:
    first, rest = iter(weights[:NUM_FIRST]), iter(weights[NUM_FIRST:])
    serving = Thread(target=leader.serve, args=(rest,), daemon=True)
    serving.start()
    try:
        update(first, version)
    finally:
        made.dismiss_peers()
        serving.join(30)
        assert not serving.is_alive() and list(rest) == [], "its part is drained, however the update ends"
