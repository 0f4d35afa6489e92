"""Defaults of the section `parallel`."""

from __future__ import annotations

from dapo_mcore.config.parallel import ParallelConfig


def test_the_experts_of_one_rank_share_its_tensor_parallelism_and_those_of_several_are_whole() -> None:
    assert ParallelConfig(tensor_parallel=4).expert_tensor_size == 4
    assert ParallelConfig(tensor_parallel=4, expert_parallel=2).expert_tensor_size == 1
    assert ParallelConfig(tensor_parallel=4, expert_parallel=2, expert_tensor_parallel=2).expert_tensor_size == 2
