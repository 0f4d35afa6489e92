"""What optimizers that save memory need of a GPU and of Transformer Engine, pretended on a CPU.

Megatron's hybrid optimizer runs as it is: only the places of tensors are pretended. FusedAdam is a plain model of Transformer
Engine's (v2.11, pytorch/optimizers/fused_adam.py) with the same attributes, state and dtypes.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import megatron.core.optimizer as upstream
import pytest
import torch
from megatron.core.optimizer import optimizer_config

from dapo_mcore.actor import actor, optimizer

HYBRID = "megatron.core.optimizer.cpu_offloading.hybrid_optimizer"


class HostTensor(torch.Tensor):
    """A tensor that was copied to the host; what is computed from it is there too."""

    is_cuda = False

    def cpu(self) -> torch.Tensor:
        """Return a plain tensor, as a checkpoint stores it."""
        return self.as_subclass(torch.Tensor)


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a process without GPU and Transformer Engine build optimizers that save memory.

    To the hybrid optimizer, tensors are on a GPU until it pins their copy.
    """
    assert actor.Actor, "all of Megatron is imported already: it would look for more of Transformer Engine than is here"
    own = torch.Tensor.is_cuda.__get__

    def is_cuda(tensor: torch.Tensor) -> bool:
        return sys._getframe(1).f_globals["__name__"] == HYBRID or own(tensor)

    monkeypatch.setattr(torch.Tensor, "is_cuda", property(is_cuda))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.as_subclass(HostTensor))
    monkeypatch.setattr(optimizer, "check_memory_support", lambda: None)
    monkeypatch.setattr(optimizer_config, "is_te_min_version", lambda version: True)
    monkeypatch.setattr(upstream, "is_te_min_version", lambda version: True)
    module = types.ModuleType("transformer_engine.pytorch.optimizers")
    module.FusedAdam = FusedAdam
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def use_fused_adam(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Megatron build FusedAdam in place of torch's AdamW."""
    monkeypatch.setattr(upstream, "USING_PYTORCH_OPTIMIZER", False)
    monkeypatch.setattr(upstream, "Adam", FusedAdam)


class FusedAdam(torch.optim.AdamW):
    """AdamW with one step count per group. With `master_weights` it keeps fp32 copies of bf16 parameters, and moments of any
    dtype; their gradients are in `decoupled_grad`."""

    def __init__(
        self,
        params: Any,
        *,
        master_weights: bool = False,
        use_decoupled_grad: bool = False,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        master_weight_dtype: torch.dtype = torch.float32,
        store_param_remainders: bool = False,
        adam_w_mode: bool = True,
        capturable: bool = False,
        **defaults: Any,
    ):
        super().__init__(params, **defaults)
        assert master_weights == use_decoupled_grad and not store_param_remainders and adam_w_mode
        self.dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype}
        self.dtypes |= {"master_param": master_weight_dtype} if master_weights else {}
        self.gradient = "decoupled_grad" if use_decoupled_grad else "grad"

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state |= {name: torch.zeros_like(parameter, dtype=dtype) for name, dtype in self.dtypes.items()}
                    state.get("master_param", parameter).copy_(parameter)
                if getattr(parameter, self.gradient, None) is not None:
                    self.update(parameter, getattr(parameter, self.gradient).float(), state, group)

    def update(self, parameter: torch.Tensor, gradient: torch.Tensor, state: Any, group: Any) -> None:
        (beta1, beta2), step, master = group["betas"], group["step"], state.get("master_param", parameter)
        first = state["exp_avg"].float().lerp(gradient, 1 - beta1)
        second = (beta2 * state["exp_avg_sq"].float()).addcmul(gradient, gradient, value=1 - beta2)
        master.mul_(1 - group["lr"] * group["weight_decay"])
        root = (second / (1 - beta2**step)).sqrt() + group["eps"]
        master.sub_(group["lr"] / (1 - beta1**step) * first / root)
        state["exp_avg"].copy_(first)
        state["exp_avg_sq"].copy_(second)
        parameter.copy_(master)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                setattr(parameter, self.gradient, None)
