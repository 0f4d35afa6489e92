"""A whole plan: the job, its batch, memory and times.

Change here: what belongs to a plan. report.py shows it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dapo_mcore.plan.batch import Batch, batch_of
from dapo_mcore.plan.job import Job
from dapo_mcore.plan.memory import Memory, memory_of
from dapo_mcore.plan.rollout_time import EvaluationTime, evaluation_times
from dapo_mcore.plan.step_time import StepTime, step_time


@dataclass(frozen=True)
class Plan:
    """All that is predicted of one run."""

    job: Job
    batch: Batch
    memory: Memory
    time: StepTime

    @property
    def fits(self) -> bool:
        return self.memory.fits

    @property
    def run_hours(self) -> float:
        """Hours of all rollout steps, without evaluations, checkpoints and starts; NaN if num_epochs leaves their number open."""
        return self.time.total * (self.job.config.num_rollout_steps or math.nan) / 3600

    @property
    def evaluations(self) -> list[EvaluationTime]:
        return evaluation_times(self.job, self.memory)

    @property
    def gpu_hours(self) -> float:
        return self.run_hours * self.job.num_gpus

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Tokens trained on, per second of the step and GPU."""
        return self.batch.train_samples * self.batch.mean_sample / self.time.total / self.job.num_gpus


def make_plan(job: Job) -> Plan:
    batch = batch_of(job)
    memory = memory_of(job, batch)
    return Plan(job, batch, memory, step_time(job, batch, memory))
