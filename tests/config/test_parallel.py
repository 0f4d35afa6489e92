"""Defaults and rules of the section `parallel`."""

from __future__ import annotations

import pytest

from dapo_mcore.config.parallel import ParallelConfig


def test_the_experts_of_one_rank_share_its_tensor_parallelism_and_those_of_several_are_whole() -> None:
    assert ParallelConfig(tensor_parallel=4).expert_tensor_size == 4
    assert ParallelConfig(tensor_parallel=4, expert_parallel=2).expert_tensor_size == 1
    assert ParallelConfig(tensor_parallel=4, expert_parallel=2, expert_tensor_parallel=2).expert_tensor_size == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"overlap_param_gather": True}, "gathers the buckets of overlap_grad_reduce, which is false"),
        ({"bucket_size": 1000}, "bucket_size 1000 has no effect without overlap_grad_reduce"),
        ({"bucket_size": 0, "overlap_grad_reduce": True}, "greater than or equal to 1"),
    ],
)
def test_what_needs_overlapped_reduction_is_refused_without_it(given: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**given)
    ParallelConfig(**given | {"overlap_grad_reduce": True, "bucket_size": 1})


def test_only_an_interleaved_pipeline_passes_micro_batches_on_in_groups() -> None:
    plain, interleaved = (
        ParallelConfig(pipeline_parallel=3),
        ParallelConfig(pipeline_parallel=3, virtual_pipeline_parallel=2),
    )
    assert (plain.num_chunks, plain.micro_batch_multiple, plain.virtual_pipeline_size) == (3, 1, None)
    assert (interleaved.num_chunks, interleaved.micro_batch_multiple, interleaved.virtual_pipeline_size) == (6, 3, 2)


def test_one_pipeline_stage_has_nothing_to_interleave() -> None:
    with pytest.raises(
        ValueError, match=r"virtual_pipeline_parallel 2 .* but pipeline_parallel is 1; raise pipeline_parallel"
    ):
        ParallelConfig(virtual_pipeline_parallel=2)
