"""Times of scoring and gradient steps: products, attention, head, memory traffic, messages between ranks, and the pipeline's bubble.

Change here: what a pass over a micro-batch costs. Work comes from architecture/flops.py, rates from hardware.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields

from dapo_mcore.actor.model.fp8_rules import bf16_layers
from dapo_mcore.config.optimizer import OptimizerConfig
from dapo_mcore.plan.batch import Batch
from dapo_mcore.plan.hardware import Gpu
from dapo_mcore.plan.held import offloaded_input, optimizer_elements
from dapo_mcore.plan.job import Job
from dapo_mcore.plan.parameters import Counts, stage_counts
from dapo_mcore.plan.products import expert_factor, product_seconds


@dataclass(frozen=True)
class Pass:
    """Seconds of one stage's GPU for the mean micro-batch, or of a whole gradient step, by cause."""

    products: float = 0.0
    attention: float = 0.0
    head: float = 0.0
    memory_traffic: float = 0.0
    recompute: float = 0.0
    messages: float = 0.0
    launches: float = 0.0
    bubble: float = 0.0
    gradient_sum: float = 0.0
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, own.name) for own in fields(self))

    def scaled(self, factor: float) -> Pass:
        return Pass(**{own.name: factor * getattr(self, own.name) for own in fields(self)})


@dataclass(frozen=True)
class TrainTime:
    """Seconds per rollout step. `update` and `score` are one gradient step and one mini-batch's scoring pass, `critic_update` and
    `critic_score` those of the critic; None without one."""

    update: Pass
    score: Pass
    critic_update: Pass | None
    critic_score: Pass | None
    num_updates: int
    num_minis: int
    num_scored: int
    num_references: int
    flops: float

    @property
    def update_s(self) -> float:
        return self.num_updates * self.update.total

    @property
    def score_s(self) -> float:
        return (self.num_scored + self.num_references) * self.score.total

    @property
    def critic_s(self) -> float:
        """Seconds of the critic's gradient steps, as many as the policy's, and of valuing every mini-batch."""
        if self.critic_update is None or self.critic_score is None:
            return 0.0
        return self.num_updates * self.critic_update.total + self.num_minis * self.critic_score.total

    def mfu(self, job: Job) -> float:
        """Return the share of the GPUs' bf16 peak that the policy's gradient steps use, recomputation not counted."""
        return self.flops / self.update_s / job.num_train / (job.gpu.bf16_tflops * 1e12)


def train_time(job: Job, batch: Batch) -> TrainTime:
    """Return the times of all gradient steps and scoring passes of a rollout step."""
    algo = job.config.algo
    num_minis, has_critic = batch.updates // job.config.batch.epochs, algo.advantage == "gae"
    per_mini = job.flops.per_token * batch.tokens + job.flops.per_square * batch.squares
    per_mini += job.flops.per_loss_token * batch.loss_tokens
    return TrainTime(
        update=_update(job, batch),
        score=_pipelined(job, batch, backward=False),
        critic_update=_update(job, batch, critic=True) if has_critic else None,
        critic_score=_pipelined(job, batch, backward=False, critic=True) if has_critic else None,
        num_updates=batch.updates,
        num_minis=num_minis,
        num_scored=num_minis
        - job.config.num_unscored(num_minis)
        + (batch.updates if algo.selects_by_covariance else 0),
        num_references=num_minis if algo.kl.coef else 0,
        flops=3 * per_mini * batch.micro_batches * job.data * batch.updates,
    )


def _update(job: Job, batch: Batch, *, critic: bool = False) -> Pass:
    """Return the seconds of a gradient step of the policy, or of the critic."""
    passes = _pipelined(job, batch, backward=True, critic=critic)
    optimizer = job.config.critic.optimizer if critic else job.config.optimizer
    worst = max((_stage_counts(job, stage, critic) for stage in range(job.pipeline)), key=lambda own: own.trained)
    return _with(
        passes,
        gradient_sum=_gradient_sum(job, worst, optimizer),
        optimizer=_optimizer(job, worst, optimizer),
        launches=_wait(job),
    )


def _stage_counts(job: Job, stage: int, critic: bool) -> Counts:
    counts = stage_counts(job, stage)
    return counts.critic or counts if critic else counts


def _with(base: Pass, **more: float) -> Pass:
    return Pass(**{own.name: getattr(base, own.name) + more.get(own.name, 0.0) for own in fields(base)})


def _wait(job: Job) -> float:
    return job.assume.update_overhead_ms / 1e3


def _pipelined(job: Job, batch: Batch, *, backward: bool, critic: bool = False) -> Pass:
    """Return the seconds of a mini-batch's passes: the slowest stage works on each micro-batch, and waits at both ends."""
    stages = (_stage(job, batch, stage, backward, critic) for stage in range(job.pipeline))
    slowest = max(stages, key=lambda own: own.total)
    count = batch.micro_batches * batch.imbalance
    waiting = (job.pipeline - 1) * slowest.total / job.chunks
    done = _with(slowest.scaled(count), bubble=waiting)
    return done if backward else _with(done, launches=_wait(job))


def _stage(job: Job, batch: Batch, stage: int, backward: bool, critic: bool) -> Pass:
    """Return the seconds of a stage's passes over the mean micro-batch. A critic's head costs nothing: one output per token."""
    assume, peak, share = job.assume, job.gpu.bf16_tflops * 1e12, len(job.stages[stage]) / job.shape.num_layers
    ranks = job.tensor * job.context
    passes = 3 if backward else 1
    forward = _products(job, batch, stage)
    square_flops = job.flops.per_square * batch.squares * share / ranks
    products = sum(forward.values())
    attention = square_flops / (assume.attention_forward * peak)
    attention_back = 2.5 * square_flops / (assume.attention_backward * peak) if backward else 0.0
    traffic = _traffic(job, batch, stage)
    forward_traffic = traffic / 3
    messages = _messages(job, batch, stage, backward)
    unhidden = max(0.0, _bus(job, batch, stage) - products - attention) if backward else 0.0
    again = products + attention + forward_traffic + messages[0] if _recomputes_all(job) and backward else 0.0
    has_head, copied = stage == job.pipeline - 1 and not critic, _stage_counts(job, stage, critic)
    gradient = assume.gradient_bytes * (copied.linear + (copied.embedding if stage == 0 else 0)) / _copy(job)
    return Pass(
        products=passes * products,
        attention=attention + attention_back,
        head=_head(job, batch, backward) if has_head else 0.0,
        memory_traffic=(traffic + gradient) if backward else forward_traffic,
        recompute=again or (_recomputed_part(job, forward) if backward else 0.0),
        messages=sum(messages) + 2 * unhidden if backward else messages[0],
        launches=_launches(job, stage) * (4 / 3 if again else 1),
    )


def _products(job: Job, batch: Batch, stage: int) -> Counter[str]:
    """Return the seconds of a stage's products in a forward pass over the mean micro-batch, by kind."""
    found: Counter[str] = Counter()
    for moe, count in Counter(job.shape.moe_layers[layer] for layer in job.stages[stage]).items():
        alike = product_seconds(job, batch, job.shape.moe_layers.index(moe))
        found.update({kind: count * seconds / _fp8_gain(job, stage) for kind, seconds in alike.items()})
    return found


def _bus(job: Job, batch: Batch, stage: int) -> float:
    """Return the seconds in which the inputs of layers go to the host, or come back, beside a pass over a micro-batch."""
    moved = len(job.stages[stage]) * offloaded_input(job, batch.tokens / job.context)
    return moved / (job.assume.pcie_efficiency * job.gpu.pcie_gbs * 1e9)


def _launches(job: Job, stage: int) -> float:
    return len(job.stages[stage]) * job.assume.layer_overhead_ms / 1e3 * (2 if job.config.model.fp8 else 1)


def _copy(job: Job) -> float:
    """Return the bytes per second of a device copy."""
    return job.assume.copy_efficiency * job.gpu.hbm_gbs * 1e9


def _fp8_gain(job: Job, stage: int) -> float:
    if (fp8 := job.config.model.fp8) is None:
        return 1.0
    gains = {
        "tensorwise": job.assume.tensorwise_gain,
        "blockwise": job.assume.blockwise_gain,
        "mxfp8": job.assume.mxfp8_gain,
    }
    recipe = fp8.recipe if fp8.recipe != "auto" else "mxfp8" if job.gpu.bf16_tflops > 2000 else "blockwise"
    plain = bf16_layers(fp8, job.shape.num_layers)
    in_fp8 = sum(layer not in plain for layer in job.stages[stage]) / len(job.stages[stage])
    return 1 / (1 - in_fp8 + in_fp8 / gains[recipe])


def _recomputes_all(job: Job) -> bool:
    return job.config.model.recompute == "full"


def _recomputed_part(job: Job, forward: Mapping[str, float]) -> float:
    """Return the seconds that a list of modules adds: products whose results are computed again."""
    recompute = job.config.model.recompute
    if not isinstance(recompute, list):
        return 0.0
    get = forward.get
    experts = get("experts", 0.0) + get("router", 0.0)
    seconds = {
        "mlp": get("mlp", 0.0) * 2 / 3,  # not the projection down
        "shared_experts": get("shared_experts", 0.0) * 2 / 3,
        "moe": experts + get("shared_experts", 0.0),
        "mla_up_proj": get("attention", 0.0) / 3,
    }
    return sum(seconds.get(module, 0.0) for module in recompute)


def _traffic(job: Job, batch: Batch, stage: int) -> float:
    """Return the seconds of everything in the layers that only moves bytes, forward and backward."""
    assume, shape = job.assume, job.shape
    tokens = batch.tokens / job.context
    heads = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim / job.tensor
    hidden = shape.hidden_size / job.token_split
    inner = sum(_inner(job, layer) for layer in job.stages[stage])
    layers = len(job.stages[stage])
    per_token = assume.swiglu_bytes * inner + layers * (assume.norm_bytes * hidden + assume.rotary_bytes * heads)
    if job.config.model.fp8:
        operands = layers * (3 * hidden + 2 * hidden + 2 * heads) + 3 * inner
        per_token += assume.cast_bytes * operands
    return tokens * per_token / _copy(job)


def _inner(job: Job, layer: int) -> float:
    """Return the inner values per token of a layer's MLP on one rank."""
    shape = job.shape
    if not shape.moe_layers[layer]:
        return shape.ffn_size / job.tensor
    chosen = job.architecture.fields["moe_router_topk"] * expert_factor(job)
    return (chosen * shape.expert_ffn + shape.shared_ffn) / job.tensor


def _head(job: Job, batch: Batch, backward: bool) -> float:
    """Return the seconds of the policy head: three products and a pass that reads logits twice and writes once, or one and one."""
    tokens, vocab = batch.loss_tokens / job.context, job.shape.padded_vocab_size / job.tensor
    products = 2 * tokens * vocab * job.shape.hidden_size / (job.assume.head_efficiency * job.gpu.bf16_tflops * 1e12)
    return products * (3 if backward else 1) + (12 if backward else 4) * tokens * vocab / _copy(job)


def _messages(job: Job, batch: Batch, stage: int, backward: bool) -> tuple[float, float]:
    """Return the seconds of messages between the ranks of one replica, in the forward and in the backward pass."""
    gpu, assume, layers = job.gpu, job.assume, len(job.stages[stage])
    tokens = batch.tokens / job.context
    hidden = job.dtype_bytes * tokens * job.shape.hidden_size
    tensor = hidden * (job.tensor - 1) / job.tensor / link(job, job.tensor)
    rounds = (
        (4, 6) if job.token_split > 1 else (4, 4)
    )  # gathers and scatters; without sequence parallelism, sums count twice
    forward, back = layers * rounds[0] * tensor, layers * rounds[1] * tensor
    moe = sum(job.shape.moe_layers[layer] for layer in job.stages[stage])
    if job.context > 1:
        keys = 2 * job.dtype_bytes * tokens * job.shape.num_kv_heads * job.shape.head_dim / job.tensor
        ring = layers * keys * (job.context - 1) / link(job, job.tensor * job.context) * (1 - assume.ring_hidden)
        forward, back = forward + ring, back + 2 * ring
    if (experts := job.config.parallel.expert_parallel) > 1:
        sent = job.architecture.fields["moe_router_topk"] * hidden / job.token_split * (experts - 1) / experts
        exchange = 2 * moe * sent * assume.expert_imbalance / link(job, experts)
        forward, back = forward + exchange, back + exchange
    if moe and (shared := job.config.parallel.expert_tensor_size) > 1:
        # an expert's ranks gather the rows that their experts get, and sum what comes out
        rows = job.architecture.fields["moe_router_topk"] * hidden / job.token_split * expert_factor(job)
        gathered = 2 * moe * rows * (shared - 1) / link(job, shared)
        forward, back = forward + gathered, back + gathered
    if job.pipeline > 1:
        between = job.chunks * hidden / job.token_split / (assume.network_efficiency * gpu.network_gbs * 1e9)
        forward, back = forward + between, back + between
    return forward, back


def link(job: Job, ranks: int) -> float:
    """Return the bytes per second between neighbours of a group of so many adjacent ranks."""
    gpu: Gpu = job.gpu
    if ranks <= job.cluster.gpus_per_node:
        return job.assume.nvlink_efficiency * gpu.nvlink_gbs * 1e9
    return job.assume.network_efficiency * gpu.network_gbs * 1e9


def _gradient_sum(job: Job, counts: Counts, optimizer: OptimizerConfig) -> float:
    """Return the seconds of summing gradients over the replicas, and of gathering updated parameters."""
    ranks = job.data * job.context
    if ranks == 1:
        return 0.0
    parallel = job.config.parallel
    hidden = job.assume.overlap_hidden
    left = {True: 1 - hidden, False: 1.0}
    width = 4 * left[parallel.overlap_grad_reduce] + job.dtype_bytes * left[parallel.overlap_param_gather]
    if not optimizer.distributed:
        width = 8 * left[parallel.overlap_grad_reduce]
    spread = job.tensor * ranks  # the ranks of a group are `tensor` apart
    dense = width * counts.dense * (ranks - 1) / ranks / link(job, spread)
    copies = job.expert_data
    experts = width * counts.experts * (copies - 1) / copies / link(job, job.num_train)
    return dense + experts


def _optimizer(job: Job, counts: Counts, optimizer: OptimizerConfig) -> float:
    elements = optimizer_elements(job, counts, optimizer)
    on_gpu = job.assume.optimizer_bytes * elements / _copy(job)
    bus = job.assume.pcie_efficiency * job.gpu.pcie_gbs * 1e9
    return on_gpu + 8 * elements * optimizer.offload_fraction / bus
