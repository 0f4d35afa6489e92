"""A node's host memory by hand. What an actor takes of it is measured in tests/actor/test_memory.py."""

from __future__ import annotations

import pytest

from dapo_mcore.checkpoint import shard_file
from dapo_mcore.plan.batch import batch_of
from dapo_mcore.plan.held import GIB, Use
from dapo_mcore.plan.host import host_memory, shared_memory
from dapo_mcore.plan.job import Job
from dapo_mcore.plan.parameters import stage_counts
from tests.plan.jobs import job

PIECE = 2**28


def host(own: Job) -> Use:
    return host_memory(own, batch_of(own))


def test_the_papers_first_node_by_hand() -> None:
    """Eight ranks that share their GPUs with as many processes of servers. Each actor waits in pieces of 256 MiB."""
    paper = job(reward__workers=32)
    counts, batch = stage_counts(paper, 1), batch_of(paper)
    state, weights = 12 * counts.buffer // 8, 2 * counts.buffer
    assert (state // PIECE, weights // PIECE) == (11, 15)  # the rests, .44 and .26 of a piece, take half of one
    parts = host(paper).parts
    assert parts["colocated actors"] / 8 == 11 * PIECE + 2**27 + 15 * PIECE + 2**27
    assert parts["processes"] == (16 + 32 / 8) * 6 * GIB
    assert parts["rollouts"] == 70 * batch.responses * batch.mean_sample
    assert parts["micro-batches"] == 8 * 58 * 8192 * batch.mean_sample / 8
    assert parts["checkpoint"] == 8 * shard_file.PIECE
    assert parts["/dev/shm"] == shared_memory(paper).total == 2 * 2 * 32_763_876_352
    assert host(paper).total == sum(parts.values()) and host(paper).capacity == 1900 * GIB


def test_a_run_without_servers_on_its_gpus_keeps_its_actors_there() -> None:
    apart = job(rollout__sglang__colocated=False, rollout__sglang__num_servers=16, rollout__sglang__sync_dir="/shared")
    assert {"colocated actors", "/dev/shm"}.isdisjoint(host(apart).parts)
    assert host(apart).parts["processes"] == 8 * 6 * GIB  # servers have nodes of their own
    one = {"rollout__sglang__num_servers": 1, "parallel": {}}
    beside = job("Qwen2.5-1.5B", nodes=1, rollout__sglang__colocated=False, **one)
    assert host(beside).parts["processes"] == (4 + 4) * 6 * GIB


def test_an_offloaded_optimizer_has_parameters_and_gradients_in_pinned_memory() -> None:
    """Its moments are not pinned. The vocabulary's matrix, 92.8 Mi elements of a rank, takes 512 MiB where it has 371."""
    half = job(optimizer__offload_fraction=0.5)
    counts = stage_counts(half, 1)
    assert 1 < counts.pinned / (4 * counts.trained) < 2
    expected = 0.5 * (8 + 8 * counts.pinned / (4 * counts.trained)) * (counts.buffer // 8)
    assert host(half).parts["offloaded optimizer"] == pytest.approx(8 * expected)


def test_inputs_of_layers_wait_in_buffers_of_a_power_of_two() -> None:
    """One of 22,528 tokens has 27.5 MiB. The first of two stages has two micro-batches of 32 layers in flight."""
    away = job(model__offload_activations=True)
    assert host(away).parts["offloaded inputs"] == 8 * 2 * (2 * 32) * 32 * 2**20


def test_a_sync_of_changes_keeps_the_last_weights() -> None:
    apart = {"rollout__sglang__colocated": False, "rollout__sglang__num_servers": 16}
    changes = job(rollout__sglang__sync="distributed", rollout__sglang__delta=True, **apart)
    assert host(changes).parts["last sent weights"] == 2 * 32_763_876_352


def test_a_checkpoint_beside_training_is_a_copy_of_all_that_a_rank_writes() -> None:
    """14 bytes a parameter in bf16; the 8 copies of each share them."""
    beside = job(checkpoint={"every": 5, "async_save": True})
    assert host(beside).parts["checkpoint"] == 8 * 14 * stage_counts(beside, 1).trained / 8


def test_no_checkpoint_no_copy() -> None:
    never = job(checkpoint={"every": None, "at_end": False})
    assert "checkpoint" not in host(never).parts
