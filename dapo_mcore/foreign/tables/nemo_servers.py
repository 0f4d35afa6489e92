"""Rules of NeMo-RL's table about servers: how many, whose GPUs they take, and their own options.

Change here: how NeMo-RL's backends of generation become SGLang's servers.
"""

from __future__ import annotations

from collections.abc import Iterator

from dapo_mcore.config.sglang import OWNED_ARGS
from dapo_mcore.foreign.table import Outcome, Source, asked, became

_GENERATION = "policy.generation"
_VLLM, _SGLANG = f"{_GENERATION}.vllm_cfg", f"{_GENERATION}.sglang_cfg"
_SHARED = f"{_GENERATION}.colocated.enabled"
_LEFT_TO_SGLANG = ("random-seed", "skip-server-warmup", "context-length")
"""NeMo-RL's context is its longest sequence, of which SGLang uses two positions less."""
_NODES, _PER_NODE = "cluster.num_nodes", "cluster.gpus_per_node"


def servers(source: Source) -> Iterator[Outcome]:
    """Yield the servers, whatever engine NeMo-RL generates with."""
    backend = source[f"{_GENERATION}.backend"] or "vllm"
    note = "servers" if backend == "sglang" else "SGLang's servers: tune their options again"
    yield Outcome("converted", (f"{_GENERATION}.backend",), "rollout.engine", "sglang", note)
    key = _size_key(source, backend)
    if key is None or (backend == "vllm" and (source[f"{_VLLM}.pipeline_parallel_size"] or 1) > 1):
        used = f"{_GENERATION}.backend" if key is None else f"{_VLLM}.pipeline_parallel_size"
        yield asked(
            "rollout.sglang.tensor_parallel", f"GPUs of one server: {backend} lays out the model in another way", used
        )
        yield asked("rollout.sglang.num_servers", "the GPUs that generate / those of one server", _NODES, _PER_NODE)
    else:
        yield became(source, "rollout.sglang.tensor_parallel", source[key] or 1, key)
        yield from _num_servers(source, key)
    shared = bool(source[_SHARED])
    note = "servers and training take turns on the GPUs" if shared else "apart"
    yield Outcome("converted", (_SHARED,), "rollout.sglang.colocated", shared, note)
    note = "how weights get there"
    yield Outcome("converted", (_SHARED,), "rollout.sglang.sync", "tensor" if shared else "distributed", note)
    if source[_NODES] > 1:
        yield Outcome("converted", (_NODES,), "rollout.sglang.placement", "nodes", f"{source[_NODES]} nodes")
        yield Outcome("converted", (_NODES,), "rollout.sglang.host", "node", "each node's own address")
    yield from _sglang_options(source) if backend == "sglang" else _vllm_options(source)


def _size_key(source: Source, backend: str) -> str | None:
    """Return the key of the GPUs of one engine; None for a backend without one."""
    if backend == "sglang":
        return next(
            (
                key
                for key in (f"{_SGLANG}.sglang_server_config.num_gpus_per_engine", f"{_SGLANG}.tp_size")
                if source.gives(key)
            ),
            None,
        )
    return f"{_VLLM}.tensor_parallel_size" if backend == "vllm" else None


def _num_servers(source: Source, size_key: str) -> Iterator[Outcome]:
    size, per_node = source[size_key] or 1, source[_PER_NODE]
    gpus, used = source[_NODES] * per_node, (_NODES, _PER_NODE)
    if not source[_SHARED]:
        place = f"{_GENERATION}.colocated.resources"
        used = (f"{place}.num_nodes", f"{place}.gpus_per_node")
        gpus = (source[used[0]] or 1) * (source[used[1]] or 0)
    if gpus and size <= per_node and gpus % size == 0:
        yield Outcome(
            "converted", (*used, size_key), "rollout.sglang.num_servers", gpus // size, f"{gpus} GPUs / {size}"
        )
    else:
        yield asked("rollout.sglang.num_servers", f"of {gpus} GPUs, those that generate, in servers of {size}", *used)


def _vllm_options(source: Source) -> Iterator[Outcome]:
    memory, eager, precision = f"{_VLLM}.gpu_memory_utilization", f"{_VLLM}.enforce_eager", f"{_VLLM}.precision"
    note = "SGLang's name; chosen for vLLM: tune it again"
    yield Outcome("converted", (memory,), "rollout.sglang.server_args", {"mem-fraction-static": source[memory]}, note)
    if source[eager]:
        yield Outcome(
            "converted", (eager,), "rollout.sglang.server_args", {"disable-cuda-graph": True}, "SGLang's name"
        )
    elif source.gives(eager):
        yield Outcome("meaningless", (eager,), note="SGLang's default, too")
    if source[precision] == "fp8":
        yield became(source, "rollout.sglang.quantize", "fp8", precision, note="scales per 128 × 128 tile")
    kept = f"{_VLLM}.kv_cache_dtype"
    if source[kept] not in (None, "auto"):
        note = "SGLang's name: fp8 is fp8_e4m3 there"
        kind = "fp8_e4m3" if source[kept] == "fp8" else source[kept]
        yield Outcome("converted", (kept,), "rollout.sglang.server_args", {"kv-cache-dtype": kind}, note)


def _sglang_options(source: Source) -> Iterator[Outcome]:
    """Yield SGLang's own options; those that the run sets itself, and those of NeMo-RL's router, change nothing."""
    limit = f"{_SGLANG}.sglang_server_config.sglang_server_concurrency"
    if source.gives(limit):
        yield became(
            source, "rollout.sglang.max_in_flight", source[limit], limit, note="requests of a server at a time"
        )
    for name, value in source.below(_SGLANG).items():
        option, key = name.replace("_", "-"), f"{_SGLANG}.{name}"
        if "." in name or option in OWNED_ARGS or option in _LEFT_TO_SGLANG or value is None:
            continue
        yield Outcome("converted", (key,), "rollout.sglang.server_args", {option: value}, "with dashes")
