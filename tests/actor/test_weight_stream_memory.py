"""A sync from a TP2 actor needs no more extra memory on rank 0 than two buckets, or twice the largest tensor, by any way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config

from dapo_mcore.actor.weight_stream import WeightStream
from dapo_mcore.handover import sync_weights
from tests.actor.parity import Mesh, make_config, spawn
from tests.model_files.peak_memory import PeakMemory, give_freed_memory_back
from tests.rollout.sglang.fake_server import fake_python
from tests.rollout.sglang.serving import settings

MIB = 2**20
BUCKET_MIB = 128
MODELS = {
    "many buckets": dict(vocab_size=2048, num_hidden_layers=7),
    "a vocabulary larger than two buckets": dict(vocab_size=2**16, num_hidden_layers=2, intermediate_size=8192),
}
SIZES = dict(
    hidden_size=1024, intermediate_size=3072, num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=False,
    architectures=["Qwen2ForCausalLM"],
)  # fmt: skip
WAYS = {
    "disk": dict(sync="disk"),
    "distributed": dict(sync="distributed"),
    "tensor": dict(sync="tensor"),
    "tensor to two ranks": dict(sync="tensor", tensor_parallel=2),
}


def peaks_of_syncs(layout: Any, mesh: Mesh, folder: str, sizes: dict[str, int]) -> dict[str, int]:
    from dapo_mcore.actor.model.policy import build_policy
    from dapo_mcore.architecture.shape import weight_shape
    from dapo_mcore.rollout.sglang.engine import SGLangEngine

    give_freed_memory_back()
    hf_config = Qwen2Config(**{**SIZES, **sizes})
    policy = build_policy(make_config(mesh), hf_config, layout)
    for _, weight in policy.named_weights():
        weight.detach().fill_(0.5)
    stream = WeightStream(policy, weight_shape(hf_config, layout.tensor), layout)
    tensors = [tensor.nbytes for _, tensor in stream()]
    peaks = {"model": sum(tensors), "largest": max(tensors, default=0)}
    for way, how in WAYS.items():
        engine = None
        if layout.is_controller:
            given = settings(
                fake_python(Path(folder)), **how, sync_dir=folder, bucket_mib=BUCKET_MIB, sync_timeout_s=120.0
            )
            engine = SGLangEngine(
                given, hf_config, stop_token_ids=(1,), dtype=torch.float32, folder=Path(folder) / f"servers-{way}"
            )
        sync_weights(stream, engine, version=1)  # threads and connections are made
        with PeakMemory() as memory:
            sync_weights(stream, engine, version=2)
        peaks[way] = memory.peak_bytes
        if engine is not None:
            engine.close()
    return peaks


@pytest.fixture(scope="module", params=MODELS)
def peaks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    folder = str(tmp_path_factory.mktemp("sync"))
    return spawn(peaks_of_syncs, Mesh(tensor=2), folder, MODELS[request.param])


@pytest.mark.parametrize("way", WAYS)
def test_a_sync_needs_at_most_two_buckets(peaks: dict[str, int], way: str) -> None:
    allowed = 2 * max(BUCKET_MIB * MIB, peaks["largest"])
    assert peaks["model"] > 1.2 * allowed, "the model must be too large to hide a copy of it"
    # more than one bucket: the measurement sees what is allocated
    assert 32 * MIB < peaks[way] <= allowed, f"{peaks[way] / MIB:.0f} MiB of {allowed / MIB:.0f}"
