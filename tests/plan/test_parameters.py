"""Parameters of a rank: by hand, against transformers on the meta device, and as a sum over every rank of a mesh."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dapo_mcore.architecture.mapping import parameters
from dapo_mcore.architecture.shape import weight_shape
from dapo_mcore.errors import ConfigError
from dapo_mcore.plan.job import Job
from dapo_mcore.plan.parameters import Counts, stage_counts, whole_model
from tests.model_files.zoo import CONFIGS, config_of
from tests.plan.jobs import hub_config, job

LAYER = (
    (5120 + 2 * 1024) * 5120 + (5120 + 2 * 1024) + 5120 * 5120 + 3 * 27648 * 5120
)  # of Qwen2.5-32B: q, k, v with biases, output, gate, up, down


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_has_the_parameters_that_transformers_builds(name: str) -> None:
    config = config_of(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    buffers = [tensor.numel() for key, tensor in model.named_buffers() if key.endswith("e_score_correction_bias")]
    assert whole_model(weight_shape(config, 1)) == sum(p.numel() for p in model.parameters()) + sum(buffers)


@pytest.mark.parametrize(
    ("model", "billions"),
    [("Qwen2.5-32B", 32.76), ("Qwen3-30B-A3B", 30.53), ("Mixtral-8x7B-v0.1", 46.70), ("DeepSeek-V3", 671.03)],
)
def test_well_known_models_have_their_published_size(model: str, billions: float) -> None:
    assert whole_model(weight_shape(hub_config(model), 1)) / 1e9 == pytest.approx(billions, abs=0.005)


def test_stages_of_a_dense_model_by_hand() -> None:
    paper = job()
    split = (LAYER - 0) // 8  # every matrix and bias of a layer is divided; its two norms are not
    layers = 32 * (split + 2 * 5120)
    vocab = 152064 * 5120 // 8
    assert [stage_counts(paper, stage).trained for stage in (0, 1)] == [layers + vocab, layers + vocab + 5120]
    assert stage_counts(paper, 0).linear == 32 * (LAYER - 7168) // 8


def test_an_uneven_pipeline_is_not_averaged() -> None:
    counts = job(
        nodes=3,
        gpus_per_node=1,
        rollout__sglang={"colocated": True, "num_servers": 3, "placement": "nodes", "host": "node"},
        parallel__tensor_parallel=1,
        parallel__pipeline_parallel=3,
        parallel__sequence_parallel=False,
    )
    assert [len(stage) for stage in counts.stages] == [21, 22, 21]
    by_layer = LAYER + 2 * 5120
    vocab = 152064 * 5120
    found = [stage_counts(counts, stage).trained for stage in range(3)]
    assert found == [21 * by_layer + vocab, 22 * by_layer, 21 * by_layer + vocab + 5120]


def test_megatrons_first_and_last_stage_and_interleaved_chunks_are_followed() -> None:
    ends = {"num_layers_in_first_pipeline_stage": 10, "num_layers_in_last_pipeline_stage": 14}
    assert [len(s) for s in job(parallel__pipeline_parallel=4, megatron=ends).stages] == [10, 20, 20, 14]
    turns = job(parallel__virtual_pipeline_parallel=4).stages
    assert turns[0] == (*range(8), *range(16, 24), *range(32, 40), *range(48, 56))
    assert sorted(turns[0] + turns[1]) == list(range(64))


def test_a_tied_embedding_is_on_the_first_and_on_the_last_stage() -> None:
    vocab = 151936 * 1536
    one = job(
        "Qwen2.5-1.5B",
        nodes=1,
        gpus_per_node=1,
        parallel__tensor_parallel=1,
        parallel__pipeline_parallel=1,
        parallel__sequence_parallel=False,
        rollout__sglang__num_servers=1,
        rollout__sglang__tensor_parallel=1,
    )
    two = job(
        "Qwen2.5-1.5B",
        nodes=1,
        gpus_per_node=2,
        parallel__tensor_parallel=1,
        parallel__sequence_parallel=False,
        rollout__sglang__num_servers=1,
        rollout__sglang__tensor_parallel=1,
    )
    both = sum(stage_counts(two, stage).trained for stage in (0, 1))
    assert both == stage_counts(one, 0).trained + vocab == whole_model(one.shape) + vocab


EXPERTS = 128 * 3 * 768 * 2048
"""Of a layer of Qwen3-30B-A3B."""


@pytest.mark.parametrize(("expert", "expert_tensor", "tensor"), [(1, None, 2), (4, None, 2), (8, 1, 2), (4, 2, 4)])
def test_experts_are_divided_by_their_own_mesh(expert: int, expert_tensor: int | None, tensor: int) -> None:
    """Not by tensor parallelism: a planner that divides them by both is too low."""
    apart = job(
        "Qwen3-30B-A3B", nodes=2, parallel__tensor_parallel=tensor, parallel__pipeline_parallel=1,
        parallel__expert_parallel=expert, parallel__expert_tensor_parallel=expert_tensor,
        rollout__sglang__num_servers=2, rollout__sglang__tensor_parallel=8,
    )  # fmt: skip
    counts = stage_counts(apart, 0)
    ranks = expert * (expert_tensor or (tensor if expert == 1 else 1))
    attention = (32 + 2 * 4) * 128 * 2048 + 32 * 128 * 2048
    dense = 48 * (attention // tensor + 2 * 2048 + 2 * 128 + 128 * 2048) + 2 * 151936 * 2048 // tensor + 2048
    held = 48 * EXPERTS // ranks
    assert counts.trained == dense + held
    assert counts.experts == (held if expert > 1 else 0)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("qwen2-moe-mixed", dict(tensor=2, pipeline=3, expert=2)),
        ("deepseek-v3", dict(tensor=2, pipeline=2, expert=4)),
        ("qwen3", dict(tensor=2, pipeline=3, expert=1)),
    ],
)
def test_all_ranks_together_hold_the_model_and_its_copies(name: str, mesh: dict[str, int]) -> None:
    """Each parameter on as many ranks as do not divide it: the tensor ranks of norms, routers and latent projections."""
    whole = _tiny(name, mesh)
    parts = [stage_counts(whole, stage) for stage in range(mesh["pipeline"])]
    shape = whole.shape
    copies = sum(
        _elements(found, shape)
        for found in parameters(shape)
        if not found.rule.per_expert and found.rule.tp_split is None
    )
    padding = 2 * (shape.padded_vocab_size - shape.vocab_size) * shape.hidden_size
    per_expert = sum(_elements(found, shape) for found in parameters(shape) if found.rule.per_expert)
    # of the float32 elements the routing bias is a parameter of the model, the count of tokens beside it is not
    dense = sum(mesh["tensor"] * (own.dense + own.float32 // 2) for own in parts)
    experts = sum(mesh["expert"] * own.experts for own in parts) if mesh["expert"] > 1 else 0
    assert experts == (per_expert if mesh["expert"] > 1 else 0)
    assert dense + experts == whole_model(shape) + (mesh["tensor"] - 1) * copies + padding


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("qwen2", {}),
    "tied": ("qwen2-tied", {}),
    "one key for four heads": ("mistral", {}),
    "9 heads, 3 keys": (
        "qwen3",
        dict(num_attention_heads=9, num_key_value_heads=3, hidden_size=36, intermediate_size=54),
    ),
    "experts": ("mixtral", {}),
    "shared experts, some layers dense": ("qwen2-moe-mixed", dict(mlp_only_layers=[0, 4])),
    "latent attention": ("deepseek-v3", dict(first_k_dense_replace=2)),
}
"""Of seven layers, which few meshes divide, and 101 words, which none does."""
MESHES = [
    (tensor, pipeline, chunks, expert, expert_tensor)
    for tensor in (1, 2, 3, 4)
    for pipeline, chunks in ((1, 1), (2, 1), (3, 1), (5, 1), (2, 2), (2, 3), (3, 2))
    for expert, expert_tensor in ((1, None), (2, None), (4, 1), (2, 2))
]
DIVIDED = re.compile(r"(\.(q|k|v|o|q_b|kv_b|gate|up|down)_proj\.|embed_tokens|lm_head)")


@pytest.mark.parametrize("kind", MODELS)
def test_every_stage_of_many_meshes_has_the_parameters_of_the_model_that_transformers_builds(kind: str) -> None:
    name, changes = MODELS[kind]
    config = config_of(name, num_hidden_layers=7, max_position_embeddings=32768, **changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sizes = [(key, tuple(found.shape)) for key, found in model.named_parameters()]
    planned = [own for mesh in MESHES if (own := _on_mesh(config, *mesh)) is not None]
    assert len(planned) >= 14
    for own in planned:
        found = [stage_counts(own, stage).trained for stage in range(own.pipeline)]
        assert found == [_by_name(sizes, own, stage) for stage in range(own.pipeline)], own.config.parallel


def _on_mesh(
    config: Any, tensor: int, pipeline: int, chunks: int, expert: int, expert_tensor: int | None
) -> Job | None:
    """Return a job of the smallest world; None if the mesh does not divide the model."""
    mesh = dict(tensor_parallel=tensor, pipeline_parallel=pipeline, virtual_pipeline_parallel=chunks)
    mesh |= dict(expert_parallel=expert, expert_tensor_parallel=expert_tensor, sequence_parallel=tensor > 1)
    try:
        return job(nodes=1, gpus_per_node=4 * tensor * pipeline, hf_config=config, parallel=mesh, rollout={})
    except ConfigError:
        return None


def _by_name(sizes: list[tuple[str, tuple[int, ...]]], own: Job, stage: int) -> int:
    """Return the elements on a rank of the stage, by the names of Hugging Face alone."""
    last, total = stage == own.pipeline - 1, 0
    for name, shape in sizes:
        elements = math.prod(shape)
        if match := re.search(r"layers\.(\d+)\.", name):
            copies = int(match[1]) in own.stages[stage]
        elif "embed_tokens" in name:
            copies = (stage == 0) or (last and own.shape.tied)
        else:
            copies = last
        if "embed_tokens" in name or "lm_head" in name:
            elements = shape[1] * 8 * own.tensor * math.ceil(shape[0] / (8 * own.tensor))
        ranks = own.tensor if DIVIDED.search(name) else 1
        if ".experts." in name:
            ranks = own.config.parallel.expert_parallel * own.config.parallel.expert_tensor_size
        assert elements % ranks == 0
        total += copies * elements // ranks
    return total


def _elements(found, shape) -> int:
    from math import prod

    from dapo_mcore.architecture.mapping import hf_shapes

    return sum(prod(sizes) for sizes in hf_shapes(found, shape))


def _tiny(name: str, mesh: dict[str, int]) -> Job:
    return job(
        nodes=1, gpus_per_node=mesh["pipeline"] * 4, hf_config=config_of(name, max_position_embeddings=32768),
        parallel__tensor_parallel=mesh["tensor"], parallel__pipeline_parallel=mesh["pipeline"],
        parallel__expert_parallel=mesh["expert"], rollout__sglang__num_servers=1, rollout__sglang__tensor_parallel=1,
    )  # fmt: skip


def test_gradient_buffers_have_megatrons_padding() -> None:
    """Three layers of qwen2's tiny config: every parameter starts at a multiple of 64, the buffer ends at one of 128 · 3."""
    tiny = job(
        nodes=1, gpus_per_node=3, hf_config=config_of("qwen2", max_position_embeddings=32768), parallel__tensor_parallel=1,
        parallel__pipeline_parallel=1, parallel__sequence_parallel=False, rollout__sglang__num_servers=1,
        rollout__sglang__tensor_parallel=1,
    )  # fmt: skip
    sizes = [104 * 32, 32, 104 * 32] + 3 * [32, 64 * 32, 64, 32 * 32, 32, 2 * 48 * 32, 48 * 32]
    padded = sum(-(-size // 64) * 64 for size in sizes)
    assert stage_counts(tiny, 0) == Counts(
        dense=sum(sizes), experts=0, linear=3 * (64 + 32 + 144) * 32, embedding=2 * 104 * 32,
        buffer=-(-padded // 384) * 384, expert_buffer=0, float32=0, largest=104 * 32,
        pinned=sum(2 ** math.ceil(math.log2(4 * size)) for size in sizes),
    )  # fmt: skip
    plain = job(
        nodes=1, gpus_per_node=3, hf_config=config_of("qwen2", max_position_embeddings=32768), parallel__tensor_parallel=1,
        parallel__pipeline_parallel=1, parallel__sequence_parallel=False, rollout__sglang__num_servers=1,
        rollout__sglang__tensor_parallel=1, optimizer__distributed=False,
    )  # fmt: skip
    assert stage_counts(plain, 0).buffer == sum(sizes)
