"""Rules of slime's table about servers: how many, whose GPUs they take, and SGLang's own options.

Change here: how slime's flags of engines and SGLang become our servers.
"""

from __future__ import annotations

from collections.abc import Iterator

from dapo_mcore.config.foreign_names import TRAINING_GPUS
from dapo_mcore.config.sglang import OWNED_ARGS
from dapo_mcore.foreign.table import Outcome, Source, asked, became

_NOT_OF_SERVERS = ("sglang-router-", "sglang-server-concurrency", "sglang-config")


def server_places(source: Source) -> Iterator[Outcome]:
    """Yield the engine, the GPUs of one server, and whose GPUs it takes."""
    key, size, machine = (
        "rollout-num-gpus-per-engine",
        source["rollout-num-gpus-per-engine"],
        source["num-gpus-per-node"],
    )
    yield Outcome("converted", (key,), "rollout.engine", "sglang", "servers")
    stages = source[source.first("sglang-pp-size", "sglang-pipeline-parallel-size")] or 1
    if stages > 1:
        note = f"slime's servers split {size} GPUs into {stages} pipeline stages, ours have tensor parallelism alone"
        yield asked("rollout.sglang.tensor_parallel", note, key)
    elif size > machine:
        note = f"slime's servers have {size} GPUs each, ours at most the {machine} of a node: does the model fit, or in fp8?"
        yield asked("rollout.sglang.tensor_parallel", note, key)
    else:
        yield became(source, "rollout.sglang.tensor_parallel", size, key)
    shared = bool(source["colocate"])
    note = "servers and training take turns on the GPUs" if shared else "servers have GPUs of their own"
    yield Outcome("converted", ("colocate",), "rollout.sglang.colocated", shared, note)
    yield Outcome("converted", ("colocate",), "rollout.sglang.sync", "tensor" if shared else "distributed", note)
    if source.run.entry == "train_async.py":
        yield Outcome("converted", (source.run.entry,), "rollout.async_steps", 1, "generated one step ahead")
        yield Outcome("converted", (source.run.entry,), "reward.workers", 8, "scoring may not hold up training")


def num_servers(source: Source) -> Iterator[Outcome]:
    """Yield the number of servers, from the GPUs that generate, and their nodes."""
    shared, own, machine = bool(source["colocate"]), source["rollout-num-gpus"], source["num-gpus-per-node"]
    actor = source["actor-num-nodes"] * source["actor-num-gpus-per-node"]
    keys = ("rollout-num-gpus",) if own is not None else ("actor-num-nodes", "actor-num-gpus-per-node")
    for key in ("actor-num-nodes", "actor-num-gpus-per-node"):
        if key not in keys and source.gives(key):
            yield Outcome("meaningless", (key,), note=TRAINING_GPUS)
    gpus, size = actor if own is None else own, source["rollout-num-gpus-per-engine"]
    if not gpus or (own is None and not shared):
        yield asked(
            "rollout.sglang.num_servers",
            "the script starts no servers: how many, or those at rollout.sglang.urls",
            *keys,
        )
        return
    if shared and gpus > actor:
        note = f"servers on {gpus} GPUs, of which training has {actor}; here colocated servers share all of theirs with training"
        yield asked("rollout.sglang.num_servers", note, *keys)
    elif size <= machine and gpus % size == 0:
        used = (*keys, "rollout-num-gpus-per-engine")
        yield Outcome("converted", used, "rollout.sglang.num_servers", gpus // size, f"{gpus} GPUs / {size}")
    else:
        note = f"{gpus} GPUs do not divide into servers of {size} on one node"
        yield asked("rollout.sglang.num_servers", note, *keys)
    if gpus > machine:
        yield Outcome("converted", keys, "rollout.sglang.placement", "nodes", f"{gpus} GPUs on nodes of {machine}")
        yield Outcome("converted", keys, "rollout.sglang.host", "node", "each node's own address")


def server_args(source: Source) -> Iterator[Outcome]:
    """Yield SGLang's own options: those of slime without `sglang-`. Some are slime's own, for its router and its client."""
    limit = "sglang-server-concurrency"
    if source.gives(limit):
        yield became(
            source, "rollout.sglang.max_in_flight", source[limit], limit, note="requests of a server at a time"
        )
    for key in source.below_flag("sglang-"):
        name = key.removeprefix("sglang-")
        if name in OWNED_ARGS:
            yield Outcome("meaningless", (key,), note="set here by the run")
        elif not key.startswith(_NOT_OF_SERVERS):
            yield Outcome("converted", (key,), "rollout.sglang.server_args", {name: source[key]}, "without sglang-")
