"""Megatron-core on a CPU: its modules see CUDA functions that use the CPU, and everyone else sees torch as it is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dapo_mcore.actor.parallel import cpu_device

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="only without a CUDA device")


@pytest.fixture(scope="module")
def megatron():
    """Return a module of megatron-core after the installation."""
    cpu_device.install_if_needed()
    from megatron.core.pipeline_parallel import schedules

    return schedules


def by_megatron(expression: str, **names: object) -> object:
    """Evaluate as code of megatron.core does."""
    return eval(expression, {"__name__": "megatron.core.some_module", **names})


def test_megatrons_torch_puts_cuda_tensors_on_the_cpu(megatron):
    assert megatron.torch is not torch
    made = megatron.torch.full((2,), 7.0, device="cuda", pin_memory=True)
    assert made.device == torch.device("cpu") and made.tolist() == [7.0, 7.0]
    assert megatron.torch.empty(1, device=megatron.torch.cuda.current_device()).device == torch.device("cpu")
    assert megatron.torch.zeros(1, device="meta").device == torch.device("meta"), "other devices stay"


def test_streams_and_events_are_always_complete(megatron):
    cuda = megatron.torch.cuda
    event = cuda.Event()
    with cuda.stream(cuda.Stream()):
        cuda.current_stream().wait_event(event)
        event.record().synchronize()
    assert cuda.current_stream() == cuda.default_stream() and not cuda.is_current_stream_capturing()


def test_what_is_not_replaced_comes_from_torch(megatron):
    assert megatron.torch.Tensor is torch.Tensor and megatron.torch.nn is torch.nn
    assert megatron.torch.distributed.ReduceOp is torch.distributed.ReduceOp


def test_the_methods_of_tensors_change_for_megatron_only(megatron):
    tensor = torch.zeros(1)
    assert by_megatron("tensor.cuda()", tensor=tensor) is tensor
    assert by_megatron("tensor.type()", tensor=tensor) == "torch.cuda.FloatTensor"
    assert by_megatron("tensor.type(dtype).dtype", tensor=tensor, dtype=torch.float64) == torch.float64
    assert tensor.type() == "torch.FloatTensor"
    with pytest.raises((RuntimeError, AssertionError)):
        tensor.cuda()


def test_installing_again_changes_nothing(megatron):
    before = megatron.torch, torch.Tensor.cuda
    cpu_device.install_if_needed()
    assert before == (megatron.torch, torch.Tensor.cuda)


def test_parts_of_unequal_lengths_are_gathered_and_scattered(megatron, monkeypatch):
    """gloo refuses them. Rank 1 of two holds 2 of 3 rows; the other rank holds [1]."""
    group = SimpleNamespace(rank=lambda: 1)
    others = iter([torch.tensor([1.0]), torch.zeros(2), torch.tensor([10.0, 20.0, 30.0])])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: tensor.add_(next(others)))
    parts = [torch.full((1,), 9.0), torch.full((2,), 9.0)]
    megatron.torch.distributed.all_gather(parts, torch.tensor([2.0, 3.0]), group=group)
    assert [part.tolist() for part in parts] == [[1.0], [2.0, 3.0]]
    own = torch.zeros(2)
    megatron.torch.distributed.reduce_scatter(own, [torch.ones(1), torch.tensor([2.0, 3.0])], group=group)
    assert own.tolist() == [22.0, 33.0]
