"""Rules of verl's table about GPUs: the training layout, and the servers that generate.

Change here: how verl's GPUs, engines and their options become servers of SGLang and a layout of Megatron.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from dapo_mcore.config.foreign_names import TRAINING_GPUS
from dapo_mcore.foreign.table import Outcome, Source, asked, became, gone
from dapo_mcore.foreign.tables.verl_defaults import is_fully_async, is_megatron

_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
_MEGATRON = f"{_ACTOR}.megatron"


def layout(source: Source) -> Iterator[Outcome]:
    """Yield the parallel layout of a Megatron script. That of an FSDP script is for a person to decide."""
    if not is_megatron(source.run):
        key, sequence = f"{_ACTOR}.strategy", f"{_ACTOR}.ulysses_sequence_parallel_size"
        ranks = source[sequence] or 1
        split = (
            f" (Ulysses over {ranks} would be context_parallel {ranks}, which stays 1 until you set it)"
            if ranks > 1
            else ""
        )
        note = (
            f"FSDP has no layout, and Megatron needs one{split}. Once all is answered, with 1 for now, `dapo-mcore plan FILE "
            "--suggest` ranks those that fit"
        )
        keys = (sequence,) if source.gives(sequence) else (key,)
        yield asked("parallel.tensor_parallel", note, *keys)
        return
    tensor = source[f"{_MEGATRON}.tensor_model_parallel_size"]
    key = f"{_MEGATRON}.sequence_parallel"
    yield became(
        source,
        "parallel.sequence_parallel",
        bool(source[key]) and tensor > 1,
        key,
        note="only with tensor_parallel above 1",
    )


def expert_tensor(source: Source) -> Iterator[Outcome]:
    """Yield the ranks that share one expert. Megatron's null is tensor_model_parallel_size; ours is 1 beside expert parallelism."""
    key, tensor = f"{_MEGATRON}.expert_tensor_parallel_size", f"{_MEGATRON}.tensor_model_parallel_size"
    experts, ours = f"{_MEGATRON}.expert_model_parallel_size", "parallel.expert_tensor_parallel"
    if source[key] is not None:
        yield became(source, ours, source[key], key)
    elif is_megatron(source.run) and source[experts] > 1 and source[tensor] > 1:
        note = "where it is null, Megatron takes tensor_model_parallel_size"
        yield Outcome("converted", (tensor, experts), ours, source[tensor], note)


def engine(source: Source) -> Iterator[Outcome]:
    """Yield the engine: servers of SGLang whatever generates there."""
    key = f"{_ROLLOUT}.name"
    name = source[key] if source.gives(key) else None
    note = "" if name == "sglang" else f"SGLang in place of {name or 'the engine'}: tune its options again"
    yield Outcome("converted" if note else "same", (key,), "rollout.engine", "sglang", note)


def server_size(source: Source) -> Iterator[Outcome]:
    """Yield the GPUs of one server, which must be on one node. An engine of several data-parallel ranks is not one of ours."""
    key, ours = f"{_ROLLOUT}.tensor_model_parallel_size", "rollout.sglang.tensor_parallel"
    size, per_node = source[key], source[_gpus(source)[1]]
    if others := _more_ranks(source):
        whole = size * math.prod(source[name] for name in others)
        note = f"verl's engines have {size} × {whole // size} = {whole} GPUs; the GPUs of one server here, at most {per_node}"
        yield asked(
            ours, f"{note}; its data-parallel attention is server_args dp-size and enable-dp-attention", key, *others
        )
    elif size > per_node:
        yield asked(
            ours,
            f"verl's servers have {size} GPUs each, ours at most the {per_node} of a node: does the model fit, or in fp8?",
            key,
        )
    else:
        yield became(source, ours, size, key)


def num_servers(source: Source) -> Iterator[Outcome]:
    """Yield the number of servers: those GPUs of verl's that generate, divided by the GPUs of one."""
    (nodes, per_node), size, ours = (
        _gpus(source),
        f"{_ROLLOUT}.tensor_model_parallel_size",
        "rollout.sglang.num_servers",
    )
    if not source.is_known(nodes):
        note = "GPUs / tensor_parallel of a server; with several nodes also rollout.sglang.placement=nodes and rollout.sglang.host=node"
        yield asked(ours, f"the script takes the number of nodes from outside: {note}", nodes, per_node, size)
        return
    if _generates_apart(source):
        for key in ("trainer.nnodes", "trainer.n_gpus_per_node"):
            if source.gives(key):
                yield Outcome("meaningless", (key,), note=TRAINING_GPUS)
    gpus = source[nodes] * source[per_node]
    if others := _more_ranks(source):
        yield asked(
            ours,
            f"{source[nodes]} × {source[per_node]} GPUs / rollout.sglang.tensor_parallel",
            nodes,
            per_node,
            *others,
        )
    elif source[size] <= source[per_node] and gpus % source[size] == 0:
        note = f"{source[nodes]} × {source[per_node]} GPUs / {source[size]}"
        yield Outcome("converted", (nodes, per_node, size), ours, gpus // source[size], note)
    else:
        note = f"{source[nodes]} × {source[per_node]} GPUs do not divide into servers of {source[size]} on one node"
        yield asked(ours, note, nodes, per_node)


def _more_ranks(source: Source) -> list[str]:
    """Return the keys by which an engine of verl has more GPUs than its tensor-parallel ranks."""
    names = (f"{_ROLLOUT}.data_parallel_size", f"{_ROLLOUT}.pipeline_model_parallel_size")
    return [name for name in names if (source[name] or 1) > 1]


def server_places(source: Source) -> Iterator[Outcome]:
    """Yield where servers run and how weights reach them."""
    nodes, _ = _gpus(source)
    shared = not _generates_apart(source) and source["actor_rollout_ref.hybrid_engine"] is not False
    key = "actor_rollout_ref.hybrid_engine"
    note = "servers and training take turns on the GPUs" if shared else "servers have GPUs of their own"
    yield Outcome("converted", (key,), "rollout.sglang.colocated", shared, note)
    sync = "tensor" if shared else "distributed"
    yield Outcome("converted", (key,), "rollout.sglang.sync", sync, "through GPU memory" if shared else "broadcasts")
    if source.is_known(nodes) and source[nodes] > 1:
        yield Outcome("converted", (nodes,), "rollout.sglang.placement", "nodes", f"{source[nodes]} nodes")
        yield Outcome("converted", (nodes,), "rollout.sglang.host", "node", "each node's own address")


def one_step_off(source: Source) -> Iterator[Outcome]:
    """Yield what verl's one-step-off program does: it trains on samples that are one version older."""
    if _is_one_step_off(source):
        entry = source.run.entry
        yield Outcome(
            "converted", (entry,), "rollout.async_steps", 1, "the next step is generated while this one trains"
        )
        yield Outcome("converted", (entry,), "reward.workers", 8, "scoring may not hold up training")
        if (
            not source["algorithm.rollout_correction.rollout_is"]
            and not source["algorithm.rollout_correction.bypass_mode"]
        ):
            note = "samples are one version older, and with bypass_mode off the script does not correct for it: truncate (cap 2), or mask"
            yield asked("algo.tis.mode", note, entry)


def _is_one_step_off(source: Source) -> bool:
    return "one_step_off" in source.run.entry


def _generates_apart(source: Source) -> bool:
    """Return True for programs whose servers have GPUs of their own: trainer.nnodes counts those of training alone."""
    return _is_one_step_off(source) or is_fully_async(source.run)


def _gpus(source: Source) -> tuple[str, str]:
    """Return the keys of the nodes, and of the GPUs on each, that generate."""
    place = "rollout" if _generates_apart(source) else "trainer"
    return f"{place}.nnodes", f"{place}.n_gpus_per_node"


def server_args(source: Source) -> Iterator[Outcome]:
    """Yield SGLang's own options. Those of vLLM alone mean nothing."""
    ours, is_sglang = "rollout.sglang.server_args", source[f"{_ROLLOUT}.name"] == "sglang"
    tune = "" if is_sglang else "; chosen for vLLM: tune it again"
    memory = f"{_ROLLOUT}.gpu_memory_utilization"
    yield Outcome("converted", (memory,), ours, {"mem-fraction-static": source[memory]}, f"SGLang's name{tune}")
    if source.gives(key := f"{_ROLLOUT}.max_num_seqs"):
        yield Outcome("converted", (key,), ours, {"max-running-requests": source[key]}, f"SGLang's name{tune}")
    vllm = f"{_ROLLOUT}.engine_kwargs.vllm.max"
    key = source.first(f"{_ROLLOUT}.max_model_len", f"{vllm}_model_len", f"{vllm}-model-len")
    if source[key] is not None:
        tokens = {"context-length": source[key] + 2}
        yield Outcome("converted", (key,), ours, tokens, "SGLang's name, and the 2 it leaves empty")
    if (source[key := f"{_ROLLOUT}.expert_parallel_size"] or 1) > 1:
        yield Outcome("converted", (key,), ours, {"ep-size": source[key]}, "SGLang's name")
    switches = {"enforce_eager": (True, {"disable-cuda-graph": True}), "enable_chunked_prefill": (False, {"chunked-prefill-size": -1}),
                "enable_prefix_caching": (False, {"disable-radix-cache": True})}  # fmt: skip
    for name, (on, option) in switches.items():
        key = f"{_ROLLOUT}.{name}"
        if source.gives(key) and bool(source[key]) is on:
            yield Outcome("converted", (key,), ours, option, "SGLang's name")
        elif source.gives(key):
            yield Outcome("meaningless", (key,), note="SGLang's default, too")
    for name, value in source.below(f"{_ROLLOUT}.engine_kwargs.sglang").items():
        option = {name.replace("_", "-"): value}
        yield Outcome("converted", (f"{_ROLLOUT}.engine_kwargs.sglang.{name}",), ours, option, "with dashes")


def quantize(source: Source) -> Iterator[Outcome]:
    """Yield the servers' quantization."""
    key = f"{_ROLLOUT}.quantization"
    if source[key] == "fp8":
        yield became(source, "rollout.sglang.quantize", "fp8", key, note="scales per 128 × 128 tile")
    elif source[key] is not None:
        yield gone(f"servers quantized with {source[key]}; nearest: fp8", key)
