"""Memory of a GPU: the peaks of the H100 table, and each phase by hand."""

from __future__ import annotations

import dataclasses

import pytest

from dapo_mcore.plan.batch import batch_of
from dapo_mcore.plan.held import GIB, held_bytes
from dapo_mcore.plan.memory import memory_of
from dapo_mcore.plan.parameters import stage_counts
from tests.plan.h100 import ROWS, Row
from tests.plan.jobs import job


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_peaks_are_those_of_an_h100(row: Row) -> None:
    use = memory_of(row.job, row.batch).worst
    found = (use.total - use.parts["reserve"] - use.parts["embedded engine"]) / GIB
    print(f"{row.name}: {found:.1f} GiB predicted, {row.peak_gib} measured")
    assert found == pytest.approx(row.peak_gib, rel=0.10)


def test_the_phases_of_the_papers_run_by_hand() -> None:
    paper = job()
    memory = memory_of(paper, batch_of(paper))
    counts = stage_counts(paper, 0)
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


def test_the_embedded_engine_has_a_model_of_its_own_on_rank_0() -> None:
    beside = job(rollout={"engine": "embedded"})
    memory = memory_of(beside, batch_of(beside))
    assert memory.train[0].parts["embedded engine"] == 2 * 32_763_876_352
    assert "embedded engine" not in memory.train[1].parts
    assert not memory.worst.fits and memory.worst.culprit == "embedded engine"
    assert not memory.server.fits


def test_the_cache_holds_the_longest_response_of_an_evaluation() -> None:
    sets = {"aime": {"files": ["unused"], "max_response_tokens": 2_000_000, "max_prompt_tokens": 1000}}
    for engine in ({}, {"rollout": {"engine": "embedded"}}):
        plain, own = job(**engine), job(eval={"sets": sets}, **engine)
        server = memory_of(own, batch_of(own)).server
        assert (server.longest, memory_of(plain, batch_of(plain)).server.longest) == (2_001_000, 2048 + 20480)
        assert not server.fits
        assert (
            "tokens of one longest sequence (eval.sets.aime.max_prompt_tokens + eval.sets.aime.max_resp"
            in server.culprit
        )
    limited = job(rollout__sglang__server_args={"max-total-tokens": 30_000})
    assert memory_of(limited, batch_of(limited)).server.kv_tokens == 30_000


def test_settings_move_the_bytes_that_they_promise() -> None:
    plain = held_bytes(job(), stage_counts(job(), 0))
    counts = stage_counts(job(), 0)
    state = counts.buffer // 8
    half = job(optimizer__offload_fraction=0.5)
    assert held_bytes(half, counts)["optimizer"] == plain["optimizer"] - 6 * state
    narrow = job(optimizer__exp_avg_dtype="bf16")
    assert held_bytes(narrow, counts)["optimizer"] == plain["optimizer"] - 2 * state
    in_fp8 = job(model__fp8={"recipe": "blockwise", "first_last_bf16": 1})
    assert memory_of(in_fp8, batch_of(in_fp8)).train[0].parts["FP8 copies"] == 2 * counts.linear * 31 / 32
    away = memory_of(in_fp8, batch_of(in_fp8))
    assert "FP8 copies" not in away.sync.parts and "FP8 copies" not in away.server.use.parts
    apart = job(model__fp8={"recipe": "blockwise"}, rollout__sglang__colocated=False, rollout__sglang__num_servers=8)
    assert memory_of(apart, batch_of(apart)).sync.parts["FP8 copies"] == 2 * counts.linear
    kept = job(algo__kl__coef=0.01)
    assert held_bytes(kept, counts)["reference"] == 2 * counts.trained
    sent = job(rollout__sglang__quantize="fp8")
    vocab = 2 * 152064 * 5120
    assert memory_of(sent, batch_of(sent)).server.use.parts["servers' weights"] == (32_763_876_352 + vocab) / 4


def test_two_inputs_of_layers_stay_on_the_gpu_and_on_the_first_stage_the_embeddings_output() -> None:
    away = job(model__offload_activations=True)
    one = 22528 * 2 * 5120 / 8
    assert [use.parts["activations"] for use in memory_of(away, batch_of(away)).train] == [3 * one, 2 * one]


def test_what_fills_the_memory_exactly_fits() -> None:
    use = memory_of(job(), batch_of(job())).server.use
    assert use.fits and use.total == pytest.approx(use.capacity)
    assert not dataclasses.replace(use, capacity=0.999 * use.capacity).fits
