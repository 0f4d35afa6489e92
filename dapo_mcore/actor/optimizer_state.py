"""Adam's state as this rank holds it: for each parameter the slice that this rank steps, as views of the live tensors.

Change here: what differs between Megatron's optimizers (plain, distributed; torch's AdamW, Transformer Engine's FusedAdam).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


class Shard(NamedTuple):
    """The state of elements start … start + n - 1 of a flattened parameter.

    parameter   the model's own tensor
    start       0 with the plain optimizer, which holds all elements on every data-parallel rank
    state       flat tensors of n elements by name: `exp_avg`, `exp_avg_sq`, and `param`, the fp32 copy that is stepped,
                where the model's parameter is not fp32 itself
    is_divided  True if every data-parallel rank holds a slice of its own (the distributed optimizer)
    """

    parameter: Tensor
    start: int
    state: dict[str, Tensor]
    is_divided: bool


def shards(parts: Sequence[MegatronOptimizer], parameters: Iterable[Tensor]) -> Iterator[Shard]:
    """Yield this rank's shards; `parts` are the chained optimizers of the model with these `parameters`. No communication.

    Creates the state, all zero, if the optimizer has not stepped yet.
    """
    for part in parts:
        _allocate(part.optimizer)
    for parameter, main, start, is_divided in _stepped(parts, parameters):
        state = next(part.optimizer.state[main] for part in parts if main in part.optimizer.state)
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor) and name != "step"}
        if parameter.dtype != torch.float32:
            tensors["param"] = main.detach()
        yield Shard(parameter, start, {name: value.view(-1) for name, value in tensors.items()}, is_divided)


def _stepped(
    parts: Sequence[MegatronOptimizer], parameters: Iterable[Tensor]
) -> Iterator[tuple[Tensor, Tensor, int, bool]]:
    """(the model's parameter, the tensor that is stepped in its place, the latter's place in the former, is_divided).

    A distributed optimizer's range is the parameter's own (`param`), not that of its bucket: buckets are padded.
    """
    divided = [part for part in parts if isinstance(part, DistributedOptimizer)]
    if not divided:
        for parameter in parameters:
            yield parameter, getattr(parameter, "main_param", parameter), 0, False
    for part in divided:
        for parameter, (group, place) in part.model_param_group_index_map.items():
            own = part._get_model_param_range_map(parameter)["param"]
            yield parameter, part.optimizer.param_groups[group]["params"][place], own.start, True


def adam_step(parts: Sequence[MegatronOptimizer]) -> float:
    """Return the steps that Adam has taken on this rank's parameters; 0 for a rank that holds none."""
    counts = (
        float(entry["step"])
        for part in parts
        for entry in (
            part.optimizer.state.values() if _counts_per_parameter(part.optimizer) else part.optimizer.param_groups
        )
        if "step" in entry
    )
    return max(counts, default=0.0)


def set_adam_step(parts: Sequence[MegatronOptimizer], step: float) -> None:
    """Set the steps taken. Every parameter gets a count of its own: a shared one would advance once per parameter."""
    for part in parts:
        if _counts_per_parameter(part.optimizer):
            for state in part.optimizer.state.values():
                state["step"] = torch.tensor(step)
        else:
            for group in part.optimizer.param_groups:
                group["step"] = int(step)


def _counts_per_parameter(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether steps are counted per parameter (torch's AdamW) or per group (Transformer Engine's FusedAdam)."""
    return any("step" in state for state in optimizer.state.values())


def _allocate(optimizer: torch.optim.Optimizer) -> None:
    """Create the state of an optimizer that has not stepped yet.

    A step without gradient at learning rate 0 creates it and changes nothing else.
    """
    if optimizer.state:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter) if parameter.numel() else None
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for entry in (*optimizer.state.values(), *optimizer.param_groups):
        if "step" in entry:
            entry["step"] = torch.tensor(0.0) if isinstance(entry["step"], Tensor) else 0
