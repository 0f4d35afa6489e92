"""A sync from a TP2 actor needs no more extra memory on rank 0 than two buckets, by either way, for a much larger model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config

from dapo_mcore.weights.sync import WeightStream, sync_weights
from tests.actor.parity import Mesh, make_config, spawn
from tests.rollout.sglang.fake_server import fake_python
from tests.rollout.sglang.serving import settings
from tests.weights.peak_memory import PeakMemory, give_freed_memory_back

BUCKET_MIB = 128
SIZES = dict(
    vocab_size=2048, hidden_size=1024, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=8,
    num_key_value_heads=2, tie_word_embeddings=False, architectures=["Qwen2ForCausalLM"],
)  # fmt: skip


def peaks_of_syncs(layout: Any, mesh: Mesh, folder: str) -> dict[str, int]:
    from dapo_mcore.actor.model import build_model
    from dapo_mcore.rollout.sglang.engine import SGLangEngine
    from dapo_mcore.weights.shape import weight_shape

    give_freed_memory_back()
    hf_config = Qwen2Config(**SIZES)
    policy = build_model(make_config(mesh), hf_config, layout)
    for _, weight in policy.named_weights():
        weight.detach().fill_(0.5)
    stream = WeightStream(policy, weight_shape(hf_config, layout.tensor), layout)
    peaks = {"model": sum(tensor.nbytes for _, tensor in stream())}
    for path in ("disk", "distributed"):
        engine = None
        if layout.is_controller:
            given = settings(
                fake_python(Path(folder)), sync=path, sync_dir=folder, bucket_mib=BUCKET_MIB, sync_timeout_s=120.0
            )
            engine = SGLangEngine(
                given, hf_config, stop_token_ids=(1,), dtype=torch.float32, folder=Path(folder) / f"servers-{path}"
            )
        sync_weights(stream, engine, version=1)  # threads and connections are made
        with PeakMemory() as memory:
            sync_weights(stream, engine, version=2)
        peaks[path] = memory.peak_bytes
        if engine is not None:
            engine.close()
    return peaks


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    return spawn(peaks_of_syncs, Mesh(tensor=2), str(tmp_path_factory.mktemp("sync")))


@pytest.mark.parametrize("path", ["disk", "distributed"])
def test_a_sync_needs_at_most_two_buckets(peaks: dict[str, int], path: str) -> None:
    two_buckets = 2 * BUCKET_MIB * 2**20
    assert peaks["model"] > 2 * two_buckets, "the model must be too large to hide a copy of it"
    # more than one parcel: the measurement sees what is allocated
    assert 32 * 2**20 < peaks[path] <= two_buckets, f"{peaks[path] / 2**20:.0f} MiB"
