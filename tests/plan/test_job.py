from __future__ import annotations

import re
from typing import Any

import pytest

from dapo_mcore.errors import ConfigError
from tests.plan.jobs import job

BESIDE = {"rollout__sglang__colocated": False}


def test_servers_on_the_trainers_gpus_take_none() -> None:
    paper = job()
    assert (paper.num_train, paper.num_servers, paper.nodes, paper.num_gpus, paper.data) == (128, 0, 16, 128, 8)
    assert (paper.token_split, paper.dtype_bytes, paper.chunks) == (8, 2, 1)


def test_servers_of_their_own_leave_the_rest_for_training() -> None:
    apart = job(**BESIDE, rollout__sglang__num_servers=16)
    assert (apart.num_train, apart.num_servers, apart.data) == (64, 64, 4)


def test_without_nodes_the_configuration_says_how_many() -> None:
    assert (job(nodes=0).num_train, job(nodes=0).nodes) == (128, 16)  # the servers share so many
    few = job(nodes=0, rollout__sglang__num_servers=5)
    assert (few.num_train, few.nodes) == (32, 4)  # a multiple of the mesh that has the servers' 20
    assert (job(nodes=0, parallel__data_parallel=8).num_train, job(nodes=0, parallel__data_parallel=8).nodes) == (
        128,
        16,
    )
    apart = job(nodes=0, **BESIDE)
    assert (apart.num_train, apart.num_servers, apart.nodes) == (16, 128, 18)


def test_the_vocabulary_is_padded_for_the_mesh() -> None:
    assert (
        job(parallel__tensor_parallel=4, of="Llama-2-7b", rollout__sglang__num_servers=1).shape.padded_vocab_size
        == 32000
    )
    assert job(of="Qwen2.5-32B").shape.padded_vocab_size == 152064


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"nodes": 1, "gpus_per_node": 12},
            "world size 12 is not a multiple of tensor_parallel 8 × pipeline_parallel 2",
        ),
        ({"parallel__data_parallel": 4}, "world size 128 is not tensor_parallel 8"),
        (BESIDE, "num_servers 32 × tensor_parallel 4 = 128 GPUs leave none of 128 for training"),
        ({"nodes": 8}, "num_servers 32 × tensor_parallel 4 = 128 GPUs, but the trainer has 64 to share"),
        (
            {"rollout__sglang__placement": "local", "rollout__sglang__host": "127.0.0.1"},
            "= 128 GPUs, but placement local starts all servers on rank 0's node, which has 8",
        ),
        (
            {"rollout__sglang__tensor_parallel": 10, "rollout__sglang__num_servers": 8},
            "tensor_parallel 10: a server is on one node, which has 8 GPUs",
        ),
        (
            {"rollout__sglang__tensor_parallel": 3, "rollout__sglang__num_servers": 8},
            "tensor_parallel 3 does not divide the model's 40 attention heads",
        ),
        ({"model__moe_aux_loss_coef": 0.01}, "model.moe_aux_loss_coef 0.01 would change nothing"),
        ({"megatron": {"account_for_loss_in_pipeline_split": True}}, "plan does not read megatron.account_for_loss"),
        ({"megatron": {"num_layers_in_first_pipeline_stage": 64}}, "leave 0 of 64 layers for 1 stages"),
        (
            {"megatron": {"num_layers_in_first_pipeline_stage": 8}, "parallel__virtual_pipeline_parallel": 2},
            "only without virtual_pipeline_parallel",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        job(**overrides)
