"""Memory of one GPU in each phase of a rollout step, and of one node's host. The worst GPU counts: stages are not averaged.

Change here: what occupies memory, and when. Bytes per token of a layer are in activations.py, parameters in parameters.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dapo_mcore.actor.model.fp8_rules import bf16_layers
from dapo_mcore.plan.activations import LayerBytes, kv_bytes_per_token, layer_bytes
from dapo_mcore.plan.batch import Batch
from dapo_mcore.plan.job import Job
from dapo_mcore.plan.parameters import Counts, stage_counts, whole_model

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


@dataclass(frozen=True)
class Server:
    """Memory of one server's GPU, whose cache must hold one longest sequence.

    kv_tokens   tokens that a server's KV cache holds
    longest     tokens of the longest sequence
    missing     bytes that are too few on this GPU for all that, negative if some are to spare
    """

    use: Use
    kv_tokens: int
    longest: int
    missing: float

    @property
    def where(self) -> str:
        return self.use.where

    @property
    def fits(self) -> bool:
        return self.use.fits and self.kv_tokens >= self.longest

    @property
    def culprit(self) -> str:
        """The name of the largest part, and what the cache lacks."""
        if self.kv_tokens >= self.longest:
            return self.use.culprit
        return f"{self.use.culprit}; the KV cache holds {self.kv_tokens:,} of the {self.longest:,} tokens of one longest sequence"


@dataclass(frozen=True)
class Memory:
    """The memory of every phase.

    train   a GPU of each pipeline stage; `worst` is the fullest
    host    of the first node; `shared`, its /dev/shm, is a part of it
    """

    train: tuple[Use, ...]
    sync: Use
    server: Server
    host: Use
    shared: Use

    @property
    def worst(self) -> Use:
        return max(self.train, key=lambda use: use.total)

    @property
    def fits(self) -> bool:
        return all(use.fits for use in (self.worst, self.sync, self.host, self.shared)) and self.server.fits


def memory_of(job: Job, batch: Batch) -> Memory:
    """Return the memory of every phase."""
    counts = [stage_counts(job, stage) for stage in range(job.pipeline)]
    train = tuple(_train(job, batch, stage, counts[stage]) for stage in range(job.pipeline))
    shared = _shared_memory(job)
    return Memory(train, _sync(job, counts[0]), _server(job), _host(job, batch, counts, shared), shared)


def held_bytes(job: Job, counts: Counts) -> dict[str, float]:
    """Return the bytes that a rank's policy, gradients and optimizer hold on the GPU between steps, exactly."""
    config, size = job.config, job.dtype_bytes
    buffers = counts.buffer + counts.expert_buffer
    weights = size * (buffers if config.optimizer.distributed else counts.trained) + 4 * counts.float32
    return {
        "parameters": weights,
        "gradients": 4 * buffers,
        "optimizer": _state_bytes(job) * optimizer_elements(job, counts),
        "reference": size * counts.trained + 4 * counts.float32 if config.algo.kl.coef else 0,
    }


def optimizer_elements(job: Job, counts: Counts) -> int:
    """Return the elements whose optimizer state a rank holds: with the distributed optimizer, those of the fullest rank."""
    if not job.config.optimizer.distributed:
        return counts.trained
    dense = min(counts.dense, counts.buffer // (job.data * job.context))
    return dense + min(counts.experts, counts.expert_buffer // job.expert_data)


def _state_bytes(job: Job) -> float:
    """Return the bytes of state per element on the GPU: two moments, and in bf16 an fp32 copy of the parameter."""
    optimizer = job.config.optimizer
    moments = sum(4 if dtype == "fp32" else 2 for dtype in (optimizer.exp_avg_dtype, optimizer.exp_avg_sq_dtype))
    return (moments + (4 if job.dtype_bytes == 2 else 0)) * (1 - optimizer.offload_fraction)


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


def _train(job: Job, batch: Batch, stage: int, counts: Counts) -> Use:
    layers = _layers(job, stage)
    tokens = batch.widest
    kept = sum(count * own.kept for own, count in layers)
    activations = tokens * kept * micro_batches_in_flight(job, stage, batch.micro_batches)
    if job.config.model.offload_activations:
        activations = min(activations, tokens * layers[0][0].kept * _inputs_on_device(job, stage))
    backward = tokens * max(own.working for own, _ in layers) + job.dtype_bytes * counts.largest
    last = stage == job.pipeline - 1
    parts = held_bytes(job, counts) | {
        "FP8 copies": _fp8_copies(job, stage, counts),
        "activations": activations,
        "scratch": max(backward, _head(job, tokens) if last else 0),
        "embedded engine": job.dtype_bytes * whole_model(job.shape) if stage == 0 and _embedded(job) else 0,
    }
    parts["reserve"] = job.assume.reserve_gib * GIB + job.assume.fragmentation * (activations + parts["scratch"])
    name = f"training, stage {stage} of {job.pipeline}" + (" (rank 0)" if parts["embedded engine"] else "")
    return _use(job, name, parts)


def _inputs_on_device(job: Job, stage: int) -> int:
    """Return how many layers' inputs stay on the GPU with offload_activations: two per chunk, and the embedding's output."""
    return 2 * job.chunks + (stage == 0)


def offloaded_bytes(job: Job, stage: int, micro_batches: float, tokens: float) -> float:
    """Return the bytes of layers' inputs that so many micro-batches keep on the host."""
    if not job.config.model.offload_activations:
        return 0
    return micro_batches * tokens * sum(count * own.kept for own, count in _layers(job, stage))


def _layers(job: Job, stage: int) -> list[tuple[LayerBytes, int]]:
    """Return the bytes of each kind of layer that a stage has, and how many there are."""
    fp8 = job.config.model.fp8
    plain = bf16_layers(fp8, job.shape.num_layers) if fp8 else frozenset()
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for layer in job.stages[stage]:
        kinds.setdefault((job.shape.moe_layers[layer], layer in plain), []).append(layer)
    return [(layer_bytes(job, alike[0]), len(alike)) for alike in kinds.values()]


def _use(job: Job, name: str, parts: dict[str, float]) -> Use:
    return Use(name, {key: value for key, value in parts.items() if value}, job.gpu.memory_gib * GIB)


def _embedded(job: Job) -> bool:
    return job.config.rollout.engine == "embedded"


def _fp8_copies(job: Job, stage: int, counts: Counts) -> float:
    """Return the bytes of the FP8 weights that Transformer Engine keeps beside the bf16 ones: one copy per direction."""
    if (fp8 := job.config.model.fp8) is None:
        return 0
    plain = bf16_layers(fp8, job.shape.num_layers)
    own = job.stages[stage]
    return 2 * counts.linear * sum(layer not in plain for layer in own) / len(own)


def _head(job: Job, tokens: int) -> float:
    """Return the policy head's scratch: fp32 logits of a chunk, its rows, their gradient, and under sequence parallelism all rows."""
    shape, batch = job.shape, job.config.batch
    vocab = shape.padded_vocab_size / job.tensor
    logits = 4 * min(batch.head_chunk_tokens, tokens) * vocab
    rows = job.dtype_bytes * tokens * shape.hidden_size * (3 if job.token_split > 1 else 2)
    gradient = 0 if batch.head_eager_grad else (4 + job.dtype_bytes) * vocab * shape.hidden_size
    return logits + rows + gradient


def _sync(job: Job, counts: Counts) -> Use:
    """Return the memory of rank 0 while weights go to the servers. Colocated, the optimizer's state is on the host by then."""
    servers = job.config.rollout.sglang
    held = held_bytes(job, counts)
    largest = job.dtype_bytes * job.shape.vocab_size * job.shape.hidden_size
    parts: dict[str, float] = {"parameters": held["parameters"], "reference": held["reference"]}
    if _shares(job):
        parts["servers' weights"] = _server_weights(job)
    else:
        parts |= {"gradients": held["gradients"], "optimizer": held["optimizer"]}
    parts["FP8 copies"] = _fp8_copies(job, 0, counts)
    if _embedded(job):
        parts["embedded engine"] = job.dtype_bytes * whole_model(job.shape)
    parts["sync buckets"] = 2 * max(servers.bucket_mib * 2**20 if not _embedded(job) else 0, largest)
    return _use(job, "sync, rank 0", parts | {"reserve": job.assume.reserve_gib * GIB})


def _shares(job: Job) -> bool:
    return job.config.rollout.engine == "sglang" and job.config.rollout.sglang.colocated


def _server_weights(job: Job) -> float:
    """Return the bytes of a server's weights on each of its GPUs."""
    servers, size = job.config.rollout.sglang, job.dtype_bytes
    whole = whole_model(job.shape)
    vocab = job.shape.vocab_size * job.shape.hidden_size * (1 if job.shape.tied else 2)
    in_fp8 = whole - vocab if servers.quantize == "fp8" else 0
    return (size * (whole - in_fp8) + in_fp8) / servers.tensor_parallel


def _server(job: Job) -> Server:
    """Return the memory of a GPU that generates. The embedded engine needs a cache of at least one longest sequence.

    Colocated, the actor is on the host, except Transformer Engine's FP8 weights, which belong to no parameter.
    """
    longest = job.config.longest_sequence
    per_token = kv_bytes_per_token(job.shape, job.dtype_bytes, 1 if _embedded(job) else _servers_tensor(job))
    if _embedded(job):
        held = sum(held_bytes(job, stage_counts(job, 0)).values())
        parts = {
            "actor": held,
            "embedded engine": job.dtype_bytes * whole_model(job.shape),
            "KV cache": per_token * longest,
        }
        use = _use(job, "generate, rank 0 (embedded engine)", parts | {"reserve": job.assume.reserve_gib * GIB})
        left = parts["KV cache"] - use.missing
        return Server(use, max(0, int(left / per_token)), longest, use.missing)
    fraction = job.config.rollout.sglang.server_args.get("mem-fraction-static") or job.assume.server_fraction
    capacity, weights = job.gpu.memory_gib * GIB, _server_weights(job)
    cache = max(0.0, float(fraction) * capacity - weights)
    stays = _fp8_copies(job, 0, stage_counts(job, 0)) if _shares(job) else 0
    outside = max((1 - float(fraction)) * capacity - stays, job.assume.reserve_gib * GIB)
    where = "generate, servers on the same GPUs" if _shares(job) else "generate, servers"
    use = _use(job, where, {"servers' weights": weights, "KV cache": cache, "FP8 copies": stays, "reserve": outside})
    missing = weights + per_token * longest - float(fraction) * capacity
    return Server(use, int(cache / per_token), longest, max(missing, use.missing))


def _servers_tensor(job: Job) -> int:
    return job.config.rollout.sglang.tensor_parallel


def _host(job: Job, batch: Batch, counts: list[Counts], shared: Use) -> Use:
    """Return the host memory of the first node, where rank 0 runs: the fullest one."""
    assume, config = job.assume, job.config
    per_node = min(job.cluster.gpus_per_node, job.num_train)
    worst = max(counts, key=lambda own: own.trained)
    held = held_bytes(job, worst)
    away = held["parameters"] + held["optimizer"] + held["reference"] if _shares(job) else 0
    offloaded = 16 * config.optimizer.offload_fraction * optimizer_elements(job, worst)
    saved = assume.save_bytes * worst.trained if config.checkpoint.every or config.checkpoint.at_end else 0
    servers = per_node / config.rollout.sglang.tensor_parallel if _shares(job) else 0
    parts = {
        "processes": (per_node + servers + config.reward.num_workers / 8) * assume.process_gib * GIB,
        "rollouts": assume.host_bytes_per_token * batch.responses * batch.mean_sample,
        "colocated actors": per_node * away,
        "offloaded optimizer": per_node * offloaded,
        "offloaded inputs": per_node * _most_offloaded(job, batch),
        "checkpoint": per_node * saved,
        "/dev/shm": shared.total,
    }
    return Use("host of the first node", {name: value for name, value in parts.items() if value}, assume.host_gib * GIB)


def _most_offloaded(job: Job, batch: Batch) -> float:
    flights = [micro_batches_in_flight(job, stage, batch.micro_batches) for stage in range(job.pipeline)]
    # twice, because a pinned buffer is handed out again only when its copies are done
    return 2 * max(offloaded_bytes(job, stage, count, batch.widest) for stage, count in enumerate(flights))


def _shared_memory(job: Job) -> Use:
    """Return /dev/shm of the first node: if weights are synced by disk in it, the files of two versions (sync/disk.py)."""
    servers = job.config.rollout.sglang
    in_memory = (
        job.config.rollout.engine == "sglang" and servers.sync == "disk" and servers.sync_dir.startswith("/dev/shm")
    )
    parts = {"weights for servers": 2 * job.dtype_bytes * whole_model(job.shape)} if in_memory else {}
    return Use("/dev/shm of the first node", parts, job.assume.host_gib / 2 * GIB)


def uses(memory: Memory) -> Iterator[Use]:
    """Yield every use in the order of a report."""
    yield from (*memory.train, memory.sync, memory.server.use, memory.host, memory.shared)
