"""The arithmetic of a mesh: how many processes it needs, and what it must fulfil for a model. No processes."""

from __future__ import annotations

import pytest

from dapo_mcore.actor.parallel.mesh import (
    check_mesh,
    data_parallel_size,
    expert_data_parallel_size,
    fewest_processes,
)
from dapo_mcore.architecture.reader import read_architecture
from dapo_mcore.config.parallel import ParallelConfig
from dapo_mcore.errors import ConfigError
from tests.actor import families
from tests.actor.parity import Mesh, make_config


def test_world_size_that_is_no_multiple_of_the_mesh_is_refused():
    parallel = ParallelConfig(tensor_parallel=2, pipeline_parallel=2)
    message = r"world size 6 is not a multiple of tensor_parallel 2 × pipeline_parallel 2 × context_parallel 1 = 4"
    with pytest.raises(ConfigError, match=message):
        data_parallel_size(parallel, 6)


def test_world_size_that_contradicts_data_parallel_is_refused():
    parallel = ParallelConfig(tensor_parallel=2, data_parallel=2)
    with pytest.raises(ConfigError, match=r"world size 2 is not .* × data_parallel 2 = 4; start 4 processes"):
        data_parallel_size(parallel, 2)


def test_what_remains_is_data_parallel():
    assert data_parallel_size(ParallelConfig(tensor_parallel=2, context_parallel=2), 8) == 2


def test_experts_fill_the_same_processes_in_their_own_way():
    parallel = ParallelConfig(tensor_parallel=2, pipeline_parallel=2, sequence_parallel=True, expert_parallel=2)
    assert expert_data_parallel_size(parallel, 8) == 2  # whole experts: expert_tensor_parallel is 1
    assert expert_data_parallel_size(parallel.model_copy(update={"expert_tensor_parallel": 2}), 8) == 1


def test_world_size_that_is_no_multiple_of_the_experts_mesh_is_refused():
    parallel = ParallelConfig(tensor_parallel=2, expert_parallel=2, expert_tensor_parallel=2)
    message = (
        r"world size 2 is not a multiple of expert_parallel 2 × expert_tensor_parallel 2 × pipeline_parallel 1 = 4"
    )
    with pytest.raises(ConfigError, match=message):
        expert_data_parallel_size(parallel, 2)


def test_the_fewest_processes_fill_both_meshes():
    assert fewest_processes(ParallelConfig(tensor_parallel=2, context_parallel=3)) == 6
    assert fewest_processes(ParallelConfig(tensor_parallel=2, expert_parallel=3)) == 6
    assert fewest_processes(ParallelConfig(pipeline_parallel=2, expert_parallel=4)) == 8
    assert fewest_processes(ParallelConfig(tensor_parallel=2, data_parallel=5)) == 10


def check(mesh: Mesh, family: str = "qwen2", **changes):
    check_mesh(read_architecture(families.hf_config(family, **changes), 64), make_config(mesh).parallel)


SIX_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96}


@pytest.mark.parametrize(
    ("mesh", "family", "changes", "message"),
    [
        (Mesh(tensor=3), "qwen2", {}, "tensor_parallel 3 does not divide num_attention_heads 4; use 1, 2 or 4"),
        (Mesh(tensor=2), "qwen2", SIX_HEADS, "tensor_parallel 2 is neither .* num_key_value_heads 3; use 1, 3 or 6"),
        (
            Mesh(tensor=2),
            "qwen2",
            {"intermediate_size": 97},
            "tensor_parallel 2 does not divide intermediate_size 97; use 1",
        ),
        (
            Mesh(pipeline=4),
            "qwen2",
            {},
            "pipeline_parallel 4 leaves stages empty: num_hidden_layers is 3; use at most 3",
        ),
        (
            Mesh(pipeline=2, virtual=3),
            "qwen2",
            {"num_hidden_layers": 5},
            "2 × virtual_pipeline_parallel 3 = 6 leaves chunks empty: num_hidden_layers is 5; use .* of at most 2",
        ),
        (Mesh(expert=2), "qwen2", {}, "Qwen2ForCausalLM has no experts, so parallel.expert_parallel must be 1 .here 2"),
        (Mesh(expert_tensor=2), "qwen2", {}, "expert_tensor_parallel null or 1 .here 2"),
        (Mesh(expert=3), "mixtral", {}, "expert_parallel 3 does not divide the number of experts 4; use 1, 2 or 4"),
        (
            Mesh(expert_tensor=5),
            "qwen3-moe",
            {},
            "expert_tensor_parallel 5 does not divide the experts' intermediate size 48; use 1, 2",
        ),
        (Mesh(tensor=2), "mixtral", {}, "tensor_parallel 2 with experts needs sequence_parallel"),
        (
            Mesh(tensor=2, sequence_parallel=True),
            "qwen2-moe",
            {"shared_expert_intermediate_size": 41},
            "does not divide shared_expert_intermediate_size 41",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_the_numbers(mesh, family, changes, message):
    with pytest.raises(ConfigError, match=message):
        check(mesh, family, **changes)


@pytest.mark.parametrize(
    ("mesh", "family", "changes"),
    [
        (Mesh(tensor=4), "qwen2", {}),  # two key-value heads
        (Mesh(tensor=2), "qwen2", {"num_key_value_heads": 1}),
        (Mesh(tensor=2, expert_tensor=1), "qwen2", {}),  # what NeMo-RL sets for every model
        (Mesh(pipeline=2), "qwen2", {"num_hidden_layers": 5}),
        (Mesh(pipeline=2, virtual=2), "qwen2", {"num_hidden_layers": 5}),
        # no dense layer: the width of the MLPs that are not there does not matter
        (Mesh(tensor=2, sequence_parallel=True), "qwen3-moe", {"intermediate_size": 97}),
        (Mesh(tensor=2, sequence_parallel=True, expert=4), "mixtral", {"intermediate_size": 97}),
    ],
)
def test_a_mesh_that_fits_passes(mesh, family, changes):
    check(mesh, family, **changes)
