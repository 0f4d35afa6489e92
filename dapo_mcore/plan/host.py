"""Memory of a node's host: processes, offloaded state, batches, a checkpoint's copies, and /dev/shm.

Change here: what waits on the host. Pinned buffers stay once they have been used, so the parts of all phases add up.
"""

from __future__ import annotations

from dapo_mcore.actor.host_copy import buffer_sizes, pinned_bytes
from dapo_mcore.checkpoint.shard_file import PIECE
from dapo_mcore.config.optimizer import OptimizerConfig
from dapo_mcore.plan.batch import Batch
from dapo_mcore.plan.held import (
    GIB,
    Use,
    critic_bytes,
    held_bytes,
    micro_batches_in_flight,
    offloaded_input,
    optimizer_elements,
    stored_bytes,
    stored_critic_bytes,
)
from dapo_mcore.plan.job import Job
from dapo_mcore.plan.parameters import Counts, stage_counts, whole_model


def host_memory(job: Job, batch: Batch) -> Use:
    """Return the host memory of the first node, where rank 0 runs: the fullest one. Its ranks count like the fullest rank."""
    assume, config, ranks = job.assume, job.config, _ranks(job)
    counts = max((stage_counts(job, stage) for stage in range(job.pipeline)), key=lambda own: own.trained)
    trained = batch.train_samples * batch.mean_sample
    parts = {
        "processes": (ranks + _server_ranks(job) + config.reward.num_workers / 8) * assume.process_gib * GIB,
        "rollouts": assume.host_bytes_per_token * batch.responses * batch.mean_sample,
        "micro-batches": ranks * assume.micro_batch_bytes * trained / job.data,
        "colocated actors": ranks * sum(map(_pinned, away_bytes(job, counts))) if job.is_colocated else 0,
        "offloaded optimizer": ranks * _offloaded_optimizer(job, counts),
        "offloaded inputs": ranks * _offloaded_inputs(job, batch),
        "last sent weights": job.dtype_bytes * whole_model(job.shape) if config.rollout.sglang.delta else 0,
        "checkpoint": ranks * _saved(job, counts),
        "/dev/shm": shared_memory(job).total,
    }
    return Use("host of the first node", {name: value for name, value in parts.items() if value}, _capacity(job))


def shared_memory(job: Job) -> Use:
    """Return /dev/shm of the first node: if weights are synced by disk in it, the files of two versions (sync/disk.py)."""
    servers = job.config.rollout.sglang
    in_memory = not job.is_embedded and servers.sync == "disk" and servers.sync_dir.startswith("/dev/shm")
    parts = {"weights for servers": 2 * job.dtype_bytes * whole_model(job.shape)} if in_memory else {}
    return Use("/dev/shm of the first node", parts, _capacity(job) / 2)


def away_bytes(job: Job, counts: Counts) -> tuple[int, int]:
    """Return the bytes that actor/memory.py moves to the host for servers on the same GPUs: (optimizer state, weights)."""
    held, critic = held_bytes(job, counts), critic_bytes(job, counts)
    weights = held["parameters"] + held["reference"] + critic.get("parameters", 0)
    return int(held["optimizer"] + critic.get("optimizer", 0)), int(weights)


def _capacity(job: Job) -> float:
    return job.gpu.host_gib * GIB


def _ranks(job: Job) -> int:
    return min(job.cluster.gpus_per_node, job.num_train)


def _server_ranks(job: Job) -> int:
    """Return the servers' processes on the first node: one per GPU."""
    if job.is_colocated:
        return _ranks(job)
    return min(job.cluster.gpus_per_node - _ranks(job), job.num_servers)


def _pinned(nbytes: int) -> int:
    return sum(map(pinned_bytes, buffer_sizes(nbytes)))


def _offloaded_optimizer(job: Job, counts: Counts) -> float:
    """Return the bytes of a rank's offload_fraction: two moments, and in pinned memory the parameter and its gradient."""
    config, critic = job.config, counts.critic
    return _offloaded(job, counts, config.optimizer) + (
        _offloaded(job, critic, config.critic.optimizer) if critic else 0
    )


def _offloaded(job: Job, counts: Counts, optimizer: OptimizerConfig) -> float:
    rounded = counts.pinned / (4 * counts.trained)
    return (8 + 8 * rounded) * optimizer.offload_fraction * optimizer_elements(job, counts, optimizer)


def _offloaded_inputs(job: Job, batch: Batch) -> float:
    """Return the bytes of a rank's model.offload_activations, one pinned buffer per layer and micro-batch in flight."""
    one = offloaded_input(job, batch.widest)
    inputs = (
        len(job.stages[stage]) * micro_batches_in_flight(job, stage, batch.micro_batches)
        for stage in range(job.pipeline)
    )
    # twice, because a pinned buffer is handed out again only when its copies are done
    return 2 * pinned_bytes(int(one)) * max(inputs)


def _saved(job: Job, counts: Counts) -> float:
    """Return the bytes of a checkpoint that a rank copies to the host: with async_save all that it writes, else a piece at a time.

    Copies of a parameter share the writing.
    """
    checkpoint = job.config.checkpoint
    if checkpoint.async_save:
        critic = stored_critic_bytes(job.config) * _written(job, counts.critic) if counts.critic else 0
        return stored_bytes(job.config) * _written(job, counts) + critic
    return min(PIECE, 4 * counts.largest) if checkpoint.every or checkpoint.at_end else 0


def _written(job: Job, counts: Counts) -> float:
    """Return the elements that each of a parameter's copies writes."""
    return counts.dense / (job.data * job.context) + counts.experts / job.expert_data
