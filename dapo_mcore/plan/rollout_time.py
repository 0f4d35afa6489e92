"""Time of generation: servers that decode as fast as they can read weights and KV cache, and the long tail of lengths.

Change here: what a decode step costs, and how requests fill a server. Prompts are short beside responses; their pass is counted
once per group, because the responses of a group share it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from dapo_mcore.plan.activations import kv_bytes_per_token
from dapo_mcore.plan.batch import Batch, mean_prompt, response_lengths
from dapo_mcore.plan.job import Job
from dapo_mcore.plan.memory import Memory
from dapo_mcore.plan.parameters import whole_model

_SLICES = 256
"""Decode steps are simulated in slices of the longest response / this."""
_MOST_TURNS = 32
"""A server that works on its requests in more turns than this repeats itself."""


@dataclass(frozen=True)
class RolloutTime:
    """Seconds per rollout step.

    num_servers   servers that generate
    generate      until the last response is done; tail: of it, the time in which a server holds under an eighth of its most requests
    prefill       prompts' passes
    host          rank 0's work for these tokens, which runs beside generation
    per_server    most requests that a server decodes at once, by memory and rollout.sglang.max_in_flight
    tokens_per_s  of all servers
    """

    num_servers: int
    generate: float
    tail: float
    prefill: float
    host: float
    per_server: int
    tokens_per_s: float

    @property
    def is_host_bound(self) -> bool:
        """True if rank 0 needs longer for the responses than the servers."""
        return self.host > self.generate + self.prefill

    @property
    def total(self) -> float:
        return max(self.generate + self.prefill, self.host)


def rollout_time(job: Job, batch: Batch, memory: Memory) -> RolloutTime:
    """Return the time of the responses of a rollout step."""
    count = num_servers(job)
    generate, tail, most = _generation(job, memory, batch.responses, job.config.rollout.max_response_tokens)
    if job.config.sampling.on_full != "wait":  # other groups fill the tail
        generate, tail = generate - tail * (1 - 1 / 16), tail / 16
    prompts = batch.groups_generated * mean_prompt(job.config, job.assume)
    tokens = batch.responses * batch.mean_response
    prefill = prompts * job.flops.per_token / _flops_per_s(job) / count
    return RolloutTime(
        num_servers=count,
        generate=generate,
        tail=tail,
        prefill=prefill,
        host=tokens * job.assume.host_ns_per_token / 1e9,
        per_server=most,
        tokens_per_s=tokens / (generate + prefill),
    )


@dataclass(frozen=True)
class EvaluationTime:
    """Seconds in which `responses` of an evaluation set are generated, each of at most `limit` tokens."""

    name: str
    responses: int
    limit: int
    seconds: float


def evaluation_times(job: Job, memory: Memory) -> list[EvaluationTime]:
    """Return the time of each evaluation set: of `limit` prompts if it has one, else of 1,000 responses, since a plan reads no data.

    Responses are as long as those of training, but for where they are cut.
    """
    found = []
    for name, own in job.config.eval.sets.items():
        responses = own.limit * job.config.eval.of(name).samples_per_prompt if own.limit else 1000
        _, limit = job.config.eval_response_limit(name)
        seconds, _, _ = _generation(job, memory, responses, limit)
        found.append(EvaluationTime(name, responses, limit, seconds))
    return found


def _generation(job: Job, memory: Memory, responses: float, limit: int) -> tuple[float, float, int]:
    """Return (seconds until the last response is done, seconds of the tail, requests at once) of responses up to `limit` tokens."""
    requests = max(1, math.ceil(responses / num_servers(job)))
    lengths = response_lengths(job.config, job.assume, min(requests, 1024), limit)
    most = min(_at_once(job, memory, limit), requests)
    simulated = min(requests, _MOST_TURNS * most)
    prompt = mean_prompt(job.config, job.assume)
    generate, tail = _simulate(tuple(lengths.tolist()), simulated, most, decode_cost(job), prompt)
    return tail + (generate - tail) * requests / simulated, tail, most


def num_servers(job: Job) -> int:
    """Return the servers that generate; the embedded engine is one of them."""
    servers = job.config.rollout.sglang
    return 1 if job.is_embedded else servers.num_servers


def _at_once(job: Job, memory: Memory, limit: int) -> int:
    """Return the most requests that a server decodes at once: as many as its cache holds, at their mean length over time."""
    lengths = response_lengths(job.config, job.assume, 1024, limit)
    mean = mean_prompt(job.config, job.assume) + float(np.square(lengths).mean() / lengths.mean()) / 2
    fits = max(1, int(memory.server.kv_tokens / mean))
    rollout = job.config.rollout
    return min(fits, rollout.max_batch if rollout.engine == "embedded" else rollout.sglang.max_in_flight)


@dataclass(frozen=True)
class Decode:
    """The cost of one decode step in seconds: fixed + per_request · requests + per_token · tokens in the cache."""

    fixed: float
    per_request: float
    per_token: float

    def step(self, requests: float, cached: float) -> float:
        return self.fixed + self.per_request * requests + self.per_token * cached


def decode_cost(job: Job) -> Decode:
    """Return the cost of a server's decode step. All weights are read; of experts, as if every one had a token."""
    assume, servers = job.assume, job.config.rollout.sglang
    embedded = job.is_embedded
    tensor = 1 if embedded else servers.tensor_parallel
    slow = assume.embedded_slowdown if embedded else 1.0
    size = 1 if servers.quantize == "fp8" and not embedded else job.dtype_bytes
    bandwidth = assume.decode_hbm_efficiency * job.gpu.hbm_gbs * 1e9
    read = size * whole_model(job.shape) / tensor / bandwidth
    cache_read = kv_bytes_per_token(job.shape, job.dtype_bytes, tensor) / bandwidth
    per_request = (job.flops.per_token + job.flops.per_loss_token) / _flops_per_s(job)
    sums = 2 * job.shape.num_layers if tensor > 1 else 0
    summed = 2 * job.dtype_bytes * job.shape.hidden_size * (tensor - 1) / tensor
    per_request += sums * summed / (assume.nvlink_efficiency * job.gpu.nvlink_gbs * 1e9)
    fixed = assume.decode_overhead_ms / 1e3 + sums * assume.decode_sum_us / 1e6 + read
    return Decode(slow * fixed, slow * per_request, slow * cache_read)


def _flops_per_s(job: Job) -> float:
    """Return the FLOP/s of one server."""
    tensor = 1 if job.is_embedded else job.config.rollout.sglang.tensor_parallel
    return job.assume.decode_gemm_efficiency * job.gpu.bf16_tflops * 1e12 * tensor


@cache
def _simulate(lengths: tuple[float, ...], requests: int, most: int, decode: Decode, prompt: int) -> tuple[float, float]:
    """Return (seconds until all requests are done, of them those of the tail) for one server.

    Requests of all lengths are mixed in time. Whenever one ends the next one starts, so `most` are decoded at once until none
    waits. Then the ones that are left end one after the other.
    """
    ordered = np.random.default_rng(0).permutation(np.array(lengths))
    queue = np.resize(ordered, requests)
    slice_tokens = max(1.0, float(max(lengths)) / _SLICES)
    left, done = queue[:most].copy(), np.zeros(min(most, requests))
    waiting, total, tail = most, 0.0, 0.0
    while len(left):
        advance = min(slice_tokens, float(left.min())) if waiting >= requests else slice_tokens
        advance = max(advance, 1.0)
        seconds = advance * decode.step(len(left), float(done.sum()) + prompt * len(left))
        total += seconds
        tail += seconds if len(left) * 8 <= most else 0.0
        left, done = left - advance, done + advance
        ended = int((left <= 0).sum())
        keep = left > 0
        new = queue[waiting : waiting + ended]
        waiting += ended
        left, done = np.concatenate([left[keep], new]), np.concatenate([done[keep], np.zeros(len(new))])
    return total, tail
