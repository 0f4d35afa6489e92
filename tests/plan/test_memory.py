"""Memory: an actor's tensors exactly, the peaks of the H100 table, and each phase by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from dapo_mcore.plan.batch import batch_of
from dapo_mcore.plan.hardware import GPUS, Assumptions
from dapo_mcore.plan.job import Cluster, make_job
from dapo_mcore.plan.memory import GIB, held_bytes, memory_of, micro_batches_in_flight
from dapo_mcore.plan.parameters import stage_counts
from tests.plan.h100 import ROWS, Row
from tests.plan.jobs import job

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("qwen2", {}),
    "bf16": ("qwen2", {"model__dtype": "bf16"}),
    "bf16, plain optimizer": ("qwen2", {"model__dtype": "bf16", "optimizer__distributed": False}),
    "tied, with a reference": ("qwen2, tied", {"model__dtype": "bf16", "algo__kl__coef": 0.1}),
    "experts": ("qwen2-moe", {"model__dtype": "bf16"}),
    "latent attention": ("deepseek-v3", {"model__dtype": "bf16"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_actors_tensors_are_counted_to_the_byte(kind: str, alone: Any) -> None:
    from dapo_mcore.actor.actor import Actor
    from dapo_mcore.actor.memory_use import MemoryUse
    from dapo_mcore.model_files.hf_folder import RandomReader
    from tests.actor import families, parity

    family, overrides = KINDS[kind]
    hf_config, config = families.hf_config(family), parity.make_config(parity.Mesh(), **overrides)
    actor = Actor(config, hf_config, alone, RandomReader(hf_config, 0))
    list(actor.optimizer.shards())  # creates the state
    planned = make_job(config, hf_config, Cluster(GPUS["h100"], 1, 1), Assumptions())
    found = MemoryUse(actor).tensors()
    held = held_bytes(planned, stage_counts(planned, 0))
    assert {"weights": held.pop("parameters"), **held} == {name: found[name] for name in ("weights", *held)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_peaks_are_those_of_an_h100(row: Row) -> None:
    use = memory_of(row.job, row.batch).worst
    found = (use.total - use.parts["reserve"] - use.parts["embedded engine"]) / GIB
    print(f"{row.name}: {found:.1f} GiB predicted, {row.peak_gib} measured")
    assert found == pytest.approx(row.peak_gib, rel=0.10)


def test_the_phases_of_the_papers_run_by_hand() -> None:
    paper = job()
    memory = memory_of(paper, batch_of(paper))
    counts, last = stage_counts(paper, 0), memory.train[1].parts
    parts = memory.train[0].parts
    buffer = counts.buffer
    assert (
        parts["parameters"] == 2 * buffer
        and parts["gradients"] == 4 * buffer
        and parts["optimizer"] == 12 * buffer // 8
    )
    assert parts["activations"] == 2 * 22528 * 32 * 2 * 5120 / 8  # two micro-batches, inputs of 32 layers
    assert memory.train[1].parts["activations"] == parts["activations"] / 2
    assert memory.worst is memory.train[0] and memory.fits
    weights = 2 * 32_763_876_352 / 4
    assert memory.server.use.parts["servers' weights"] == weights
    assert memory.server.use.parts["KV cache"] == 0.85 * 79.2 * GIB - weights
    assert memory.server.kv_tokens == int((0.85 * 79.2 * GIB - weights) / (64 * 2 * 2 * 128 * 2))
    # colocated, the optimizer's state is on the host while weights are sent
    assert set(memory.sync.parts) == {"parameters", "servers' weights", "sync buckets", "reserve"}
    assert memory.sync.parts["sync buckets"] == 2 * 2 * 152064 * 5120  # the embedding is larger than a bucket
    assert memory.host.parts["colocated actors"] == 8 * (last["parameters"] + last["optimizer"])
    assert memory.shared.parts == {"weights for servers": 2 * 2 * 32_763_876_352}


def test_the_embedded_engine_has_a_model_of_its_own_on_rank_0() -> None:
    beside = job(rollout={"engine": "embedded"})
    memory = memory_of(beside, batch_of(beside))
    assert memory.train[0].parts["embedded engine"] == 2 * 32_763_876_352
    assert "embedded engine" not in memory.train[1].parts
    assert not memory.worst.fits and memory.worst.culprit == "embedded engine"
    assert not memory.server.fits


def test_a_stage_keeps_one_micro_batch_per_stage_that_follows_and_one() -> None:
    four = job(parallel__tensor_parallel=4, parallel__pipeline_parallel=4)
    assert [micro_batches_in_flight(four, stage, 20) for stage in range(4)] == [4, 3, 2, 1]
    assert micro_batches_in_flight(four, 0, 2) == 2
    turns = job(parallel__tensor_parallel=4, parallel__pipeline_parallel=4, parallel__virtual_pipeline_parallel=2)
    # chunks of half a stage: 2 per stage that follows, 4 of the first chunk, 1
    assert [micro_batches_in_flight(turns, stage, 20) for stage in range(4)] == [5.5, 4.5, 3.5, 2.5]
    assert micro_batches_in_flight(turns, 0, 4) == 4


def test_settings_move_the_bytes_that_they_promise() -> None:
    plain = held_bytes(job(), stage_counts(job(), 0))
    counts = stage_counts(job(), 0)
    state = counts.buffer // 8
    half = job(optimizer__offload_fraction=0.5)
    assert held_bytes(half, counts)["optimizer"] == plain["optimizer"] - 6 * state
    assert memory_of(half, batch_of(half)).host.parts["offloaded optimizer"] == 8 * 16 * 0.5 * (
        stage_counts(half, 1).buffer // 8
    )
    narrow = job(optimizer__exp_avg_dtype="bf16")
    assert held_bytes(narrow, counts)["optimizer"] == plain["optimizer"] - 2 * state
    in_fp8 = job(model__fp8={"recipe": "blockwise", "first_last_bf16": 1})
    assert memory_of(in_fp8, batch_of(in_fp8)).train[0].parts["FP8 copies"] == 2 * counts.linear * 31 / 32
    generate = memory_of(in_fp8, batch_of(in_fp8)).server.use
    assert generate.parts["FP8 copies"] == 2 * counts.linear * 31 / 32 and generate.total == pytest.approx(79.2 * GIB)
    kept = job(algo__kl__coef=0.01)
    assert held_bytes(kept, counts)["reference"] == 2 * counts.trained
    sent = job(rollout__sglang__quantize="fp8")
    vocab = 2 * 152064 * 5120
    assert memory_of(sent, batch_of(sent)).server.use.parts["servers' weights"] == (32_763_876_352 + vocab) / 4


def test_inputs_of_layers_wait_on_the_host() -> None:
    """Two of a stage's 32 stay, and on the first stage the embedding's output. The host needs up to twice the rest."""
    away = job(model__offload_activations=True)
    memory = memory_of(away, batch_of(away))
    one = 22528 * 2 * 5120 / 8
    assert [use.parts["activations"] for use in memory.train] == [3 * one, 2 * one]
    assert memory.host.parts["offloaded inputs"] == 2 * 8 * 2 * 32 * one


def test_what_fills_the_memory_exactly_fits() -> None:
    use = memory_of(job(), batch_of(job())).server.use
    assert use.fits and use.total == pytest.approx(use.capacity)
    assert not dataclasses.replace(use, capacity=0.999 * use.capacity).fits
