"""Memory of one GPU in each phase of a rollout step. The worst GPU counts: stages are not averaged.

Change here: what occupies a GPU, and when. What a rank holds all the time is in held.py, a node's host in host.py, bytes per
token of a layer in activations.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dapo_mcore.actor.model.fp8_rules import bf16_layers
from dapo_mcore.plan.activations import kv_bytes_per_token
from dapo_mcore.plan.batch import Batch
from dapo_mcore.plan.held import GIB, Use, critic_bytes, held_bytes, micro_batches_in_flight, stage_layers
from dapo_mcore.plan.host import host_memory, shared_memory
from dapo_mcore.plan.job import Job
from dapo_mcore.plan.parameters import Counts, stage_counts, whole_model


@dataclass(frozen=True)
class Server:
    """Memory of one server's GPU, whose cache must hold one longest sequence.

    kv_tokens   tokens that a server's KV cache holds
    longest     tokens of the longest sequence, in training or in an evaluation; longest_keys: the settings that limit it
    missing     bytes that are too few on this GPU for all that, negative if some are to spare
    """

    use: Use
    kv_tokens: int
    longest: int
    longest_keys: str
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
        return (
            f"{self.use.culprit}; the KV cache holds {self.kv_tokens:,} of the {self.longest:,} tokens of one longest sequence "
            f"({self.longest_keys})"
        )


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
    return Memory(train, _sync(job, counts[0]), _server(job), host_memory(job, batch), shared_memory(job))


def _train(job: Job, batch: Batch, stage: int, counts: Counts) -> Use:
    layers = stage_layers(job, stage)
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
        "embedded engine": job.dtype_bytes * whole_model(job.shape) if stage == 0 and job.is_embedded else 0,
    }
    parts["reserve"] = job.assume.reserve_gib * GIB + job.assume.fragmentation * (activations + parts["scratch"])
    name = f"training, stage {stage} of {job.pipeline}" + (" (rank 0)" if parts["embedded engine"] else "")
    return _use(job, name, parts)


def _inputs_on_device(job: Job, stage: int) -> int:
    """Return how many layers' inputs stay on the GPU with offload_activations: two per chunk, and the embedding's output."""
    return 2 * job.chunks + (stage == 0)


def _use(job: Job, name: str, parts: dict[str, float]) -> Use:
    return Use(name, {key: value for key, value in parts.items() if value}, job.gpu.memory_gib * GIB)


def _fp8_copies(job: Job, stage: int, counts: Counts) -> float:
    """Return the bytes of the FP8 weights that Transformer Engine keeps beside the bf16 ones: one copy per direction."""
    if (fp8 := job.config.model.fp8) is None:
        return 0
    plain = bf16_layers(fp8, job.shape.num_layers)
    own, models = job.stages[stage], 2 if counts.critic else 1
    return 2 * models * counts.linear * sum(layer not in plain for layer in own) / len(own)


def _head(job: Job, tokens: int) -> float:
    """Return the policy head's scratch: fp32 logits of a chunk, its rows, their gradient, and under sequence parallelism all rows."""
    shape, batch = job.shape, job.config.batch
    vocab = shape.padded_vocab_size / job.tensor
    logits = 4 * min(batch.head_chunk_tokens, tokens) * vocab
    rows = job.dtype_bytes * tokens * shape.hidden_size * (3 if job.token_split > 1 else 2)
    gradient = 0 if batch.head_eager_grad else (4 + job.dtype_bytes) * vocab * shape.hidden_size
    return logits + rows + gradient


def _sync(job: Job, counts: Counts) -> Use:
    """Return the memory of rank 0 while weights go to the servers. Colocated, only the actor's weights are left by then."""
    servers = job.config.rollout.sglang
    held = held_bytes(job, counts)
    largest = job.dtype_bytes * job.shape.vocab_size * job.shape.hidden_size
    critic = critic_bytes(job, counts)
    parts: dict[str, float] = {"parameters": held["parameters"], "reference": held["reference"]}
    parts["critic"] = critic.get("parameters", 0) if job.is_colocated else sum(critic.values())
    if job.is_colocated:
        parts["servers' weights"] = _server_weights(job)
    else:
        parts |= {"gradients": held["gradients"], "optimizer": held["optimizer"]}
        parts["FP8 copies"] = _fp8_copies(job, 0, counts)
    if job.is_embedded:
        parts["embedded engine"] = job.dtype_bytes * whole_model(job.shape)
    parts["sync buckets"] = 2 * max(servers.bucket_mib * 2**20 if not job.is_embedded else 0, largest)
    return _use(job, "sync, rank 0", parts | {"reserve": job.assume.reserve_gib * GIB})


def _server_weights(job: Job) -> float:
    """Return the bytes of a server's weights on each of its GPUs."""
    servers, size = job.config.rollout.sglang, job.dtype_bytes
    whole = whole_model(job.shape)
    vocab = job.shape.vocab_size * job.shape.hidden_size * (1 if job.shape.tied else 2)
    in_fp8 = whole - vocab if servers.quantize == "fp8" else 0
    return (size * (whole - in_fp8) + in_fp8) / servers.tensor_parallel


def _server(job: Job) -> Server:
    """Return the memory of a GPU that generates. Colocated, nothing of the actor is on it."""
    if job.is_embedded:
        return _embedded_engine(job)
    servers, capacity = job.config.rollout.sglang, job.gpu.memory_gib * GIB
    keys, longest = job.config.longest_generation
    fraction = float(servers.server_args.get("mem-fraction-static") or job.assume.server_fraction)
    per_token = kv_bytes_per_token(job.shape, job.dtype_bytes, servers.tensor_parallel)
    weights = _server_weights(job)
    cache = max(0.0, fraction * capacity - weights)
    outside = max((1 - fraction) * capacity, job.assume.reserve_gib * GIB)
    where = "generate, servers on the same GPUs" if job.is_colocated else "generate, servers"
    use = _use(job, where, {"servers' weights": weights, "KV cache": cache, "reserve": outside})
    missing = weights + per_token * longest - fraction * capacity
    most = servers.server_args.get("max-total-tokens") or math.inf
    return Server(use, int(min(cache / per_token, most)), longest, keys, max(missing, use.missing))


def _embedded_engine(job: Job) -> Server:
    """Return the memory of rank 0 while it generates. Its cache must hold at least one longest sequence."""
    (keys, longest), counts = job.config.longest_generation, stage_counts(job, 0)
    per_token = kv_bytes_per_token(job.shape, job.dtype_bytes, 1)
    parts = {
        "actor": sum(held_bytes(job, counts).values()) + _fp8_copies(job, 0, counts),
        "embedded engine": job.dtype_bytes * whole_model(job.shape),
        "KV cache": per_token * longest,
        "reserve": job.assume.reserve_gib * GIB,
    }
    use = _use(job, "generate, rank 0 (embedded engine)", parts)
    left = parts["KV cache"] - use.missing
    return Server(use, max(0, int(left / per_token)), longest, keys, use.missing)


def uses(memory: Memory) -> Iterator[Use]:
    """Yield every use in the order of a report."""
    yield from (*memory.train, memory.sync, memory.server.use, memory.host, memory.shared)
