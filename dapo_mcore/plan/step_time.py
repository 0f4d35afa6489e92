"""The time of a rollout step from its parts: generation, weight sync, scoring, gradient steps; and of the whole run.

Change here: which parts of a step wait for each other, and what a weight sync costs.
"""

from __future__ import annotations

from dataclasses import dataclass

from dapo_mcore.plan.batch import Batch
from dapo_mcore.plan.host import away_bytes
from dapo_mcore.plan.job import Job
from dapo_mcore.plan.memory import Memory
from dapo_mcore.plan.parameters import stage_counts, whole_model
from dapo_mcore.plan.rollout_time import RolloutTime, rollout_time
from dapo_mcore.plan.train_time import TrainTime, train_time


@dataclass(frozen=True)
class StepTime:
    """Seconds of a rollout step.

    handover   colocated: the actor's way to the host and back
    total      of the whole step; with rollout.async_steps generation runs beside training
    """

    rollout: RolloutTime
    train: TrainTime
    sync: float
    handover: float
    is_async: bool

    @property
    def total(self) -> float:
        training = self.train.score_s + self.train.update_s + self.train.critic_s
        generation = self.rollout.total
        both = max(generation, training) if self.is_async else generation + training
        return both + self.sync + self.handover

    @property
    def work(self) -> float:
        """The sum of all parts, also of those that run beside each other."""
        training = self.train.score_s + self.train.update_s + self.train.critic_s
        return self.rollout.total + training + self.sync + self.handover


def step_time(job: Job, batch: Batch, memory: Memory, rollout: RolloutTime | None = None) -> StepTime:
    """Return the times of the job's rollout step. rollout: generation, if it is known already."""
    return StepTime(
        rollout=rollout or rollout_time(job, batch, memory),
        train=train_time(job, batch),
        sync=_sync(job),
        handover=_handover(job),
        is_async=job.config.rollout.async_steps > 0,
    )


def _sync(job: Job) -> float:
    """Return the seconds of a weight sync: the model passes through rank 0, and from there to the servers.

    With sync distributed each leader takes in its own part, at the same time as the others (train/leaders.py). A server takes
    one leader's bucket at a time, so the way to the servers is as long as with one leader. With sync tensor on all nodes the
    model also passes once to the first rank of each node (sync/relay.py). With delta rank 0 compares with the last weights,
    which come from the host, and only changes go on (sync/delta.py).
    """
    servers, assume = job.config.rollout.sglang, job.assume
    nbytes = job.dtype_bytes * whole_model(job.shape)
    network = assume.network_efficiency * job.gpu.network_gbs * 1e9
    collected = nbytes * _far_share(job) / network
    if job.is_embedded:
        return collected + nbytes / (assume.copy_efficiency * job.gpu.hbm_gbs * 1e9)
    speed = {"disk": assume.disk_sync_gbs, "distributed": assume.sync_gbs, "tensor": assume.tensor_sync_gbs}
    sent = nbytes * (assume.changed_bytes if servers.delta else 1)
    compared = nbytes / (assume.pcie_efficiency * job.gpu.pcie_gbs * 1e9) if servers.delta else 0.0
    relayed = sent / network if servers.sync == "tensor" and servers.placement == "nodes" and job.nodes > 1 else 0.0
    passes = -(-servers.num_servers // (servers.servers_per_group or servers.num_servers))
    spread = sent / (speed[servers.sync] * 1e9) * (passes if servers.sync == "distributed" else 1)
    return collected + compared + relayed + spread


def _far_share(job: Job) -> float:
    """Return the share of the model that one leader takes in from other nodes: a leader has only its own stage's first ranks
    beside it."""
    servers, per_node = job.config.rollout.sglang, job.cluster.gpus_per_node
    several = not job.is_embedded and servers.sync == "distributed" and not servers.delta
    leaders = min(servers.senders, job.pipeline) if several else 1
    if job.num_train <= per_node:
        return 0.0
    return max(0.0, 1 / leaders - min(per_node, job.tensor) / (job.tensor * job.pipeline))


def _handover(job: Job) -> float:
    if not job.is_colocated:
        return 0.0
    return 2 * sum(away_bytes(job, stage_counts(job, 0))) / (job.assume.pcie_efficiency * job.gpu.pcie_gbs * 1e9)
