"""What a rank of the trainer holds: its actor between steps to the byte, and layers' inputs of micro-batches in flight.

Change here: the bytes of weights, gradients and optimizer state. Phases of a GPU are in memory.py, a node's host in host.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from dapo_mcore.actor.model.fp8_rules import bf16_layers
from dapo_mcore.config.optimizer import OptimizerConfig
from dapo_mcore.config.schema import Config
from dapo_mcore.plan.activations import LayerBytes, layer_bytes
from dapo_mcore.plan.job import Job
from dapo_mcore.plan.parameters import Counts

GIB = 2**30


@dataclass(frozen=True)
class Use:
    """Bytes of one GPU, or of one node's host, by what they are for.

    where     the phase and the GPU, for people
    parts     bytes by name, in the order of a report
    capacity  bytes that there are
    """

    where: str
    parts: dict[str, float]
    capacity: float

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def missing(self) -> float:
        """Bytes beyond the capacity; negative if some are to spare."""
        return self.total - self.capacity

    @property
    def fits(self) -> bool:
        return self.missing <= 1e-9 * self.capacity  # parts that fill it exactly are rounded

    @property
    def culprit(self) -> str:
        """The name of the largest part that a setting can change."""
        return max((name for name in self.parts if name != "reserve"), key=lambda name: self.parts[name])


def held_bytes(job: Job, counts: Counts) -> dict[str, float]:
    """Return the bytes that a rank's models, gradients and optimizers hold on the GPU between steps, exactly but for a critic's
    value head in bf16. `critic` has all three."""
    config, size = job.config, job.dtype_bytes
    critic = critic_bytes(job, counts)
    return trained_bytes(job, counts, config.optimizer) | {
        "reference": size * counts.trained + 4 * counts.float32 if config.algo.kl.coef else 0,
        **({"critic": sum(critic.values())} if critic else {}),
    }


def critic_bytes(job: Job, counts: Counts) -> dict[str, float]:
    """Return the trained_bytes of the critic; {} without one."""
    return trained_bytes(job, counts.critic, job.config.critic.optimizer) if counts.critic else {}


def trained_bytes(job: Job, counts: Counts, optimizer: OptimizerConfig) -> dict[str, float]:
    """Return the bytes of a trained model with these elements: `parameters`, `gradients`, and the `optimizer` on the GPU."""
    buffers = counts.buffer + counts.expert_buffer
    state = state_bytes(optimizer, job.config.model.dtype) * (1 - optimizer.offload_fraction)
    return {
        "parameters": job.dtype_bytes * (buffers if optimizer.distributed else counts.trained) + 4 * counts.float32,
        "gradients": 4 * buffers,
        "optimizer": state * optimizer_elements(job, counts, optimizer),
    }


def optimizer_elements(job: Job, counts: Counts, optimizer: OptimizerConfig) -> int:
    """Return the elements whose optimizer state a rank holds: with the distributed optimizer, those of the fullest rank."""
    if not optimizer.distributed:
        return counts.trained
    dense = min(counts.dense, counts.buffer // (job.data * job.context))
    return dense + min(counts.experts, counts.expert_buffer // job.expert_data)


def state_bytes(optimizer: OptimizerConfig, dtype: str) -> int:
    """Return the bytes of optimizer state per parameter: two moments, and in bf16 an fp32 copy of the parameter."""
    moments = sum(4 if dtype == "fp32" else 2 for dtype in (optimizer.exp_avg_dtype, optimizer.exp_avg_sq_dtype))
    return moments + (4 if dtype == "bf16" else 0)


def stored_bytes(config: Config) -> int:
    """Return the bytes of a checkpoint per parameter of the policy: its weight, its optimizer state, and a reference policy's
    weight."""
    models = 2 if config.algo.kl.coef else 1
    return state_bytes(config.optimizer, config.model.dtype) + weight_bytes(config) * models


def stored_critic_bytes(config: Config) -> int:
    """Return the bytes of a checkpoint per parameter of the critic; 0 without one."""
    if config.algo.advantage != "gae":
        return 0
    return state_bytes(config.critic.optimizer, config.model.dtype) + weight_bytes(config)


def weight_bytes(config: Config) -> int:
    return 2 if config.model.dtype == "bf16" else 4


def micro_batches_in_flight(job: Job, stage: int, num_micro_batches: int) -> float:
    """Return how many micro-batches' activations a stage keeps at once.

    1F1B starts one more per stage that follows. Interleaved, a stage starts 2 chunks more per stage that follows, and all of
    its chunks but one for each stage (megatron-core's get_pp_rank_microbatches).
    """
    later = job.pipeline - stage - 1
    if job.chunks == 1:
        return min(num_micro_batches, later + 1)
    started = 2 * later + (job.chunks - 1) * job.pipeline + 1
    return min(num_micro_batches * job.chunks, started) / job.chunks


def stage_layers(job: Job, stage: int) -> list[tuple[LayerBytes, int]]:
    """Return the bytes of each kind of layer that a stage has, and how many there are."""
    fp8 = job.config.model.fp8
    plain = bf16_layers(fp8, job.shape.num_layers) if fp8 else frozenset()
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for layer in job.stages[stage]:
        kinds.setdefault((job.shape.moe_layers[layer], layer in plain), []).append(layer)
    return [(layer_bytes(job, alike[0]), len(alike)) for alike in kinds.values()]


def offloaded_input(job: Job, tokens: float) -> float:
    """Return the bytes of a layer's input of so many tokens, which waits on the host with model.offload_activations."""
    return tokens * stage_layers(job, 0)[0][0].kept if job.config.model.offload_activations else 0
