"""AdamW and its schedule, as Megatron runs them over the mesh."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, merge
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from dapo_mcore import config as settings


class Optimizer:
    """Megatron's optimizer with its scheduler. Gradient steps count from 1: step u uses lr · min(1, u / warm-up)."""

    def __init__(self, model: DistributedDataParallel, config: settings.OptimizerConfig, dtype: torch.dtype):
        self.config = config
        self.megatron: MegatronOptimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=config.lr,
                min_lr=config.min_lr,
                weight_decay=config.weight_decay,
                adam_beta1=config.beta1,
                adam_beta2=config.beta2,
                adam_eps=config.eps,
                clip_grad=config.clip_grad,
                use_distributed_optimizer=config.distributed,
                params_dtype=dtype,
                bf16=dtype == torch.bfloat16,
            ),
            [model],
            use_gloo_process_groups=False,
        )
        # upstream exempts norms and biases from weight decay only through this scheduler (a group field it applies)
        self.scheduler = OptimizerParamScheduler(
            self.megatron,
            init_lr=0.0,
            max_lr=config.lr,
            min_lr=config.min_lr,
            lr_warmup_steps=config.warmup_updates,
            lr_decay_steps=config.decay_updates or config.warmup_updates + 1,
            lr_decay_style=config.schedule,
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=1,
            wd_incr_style="constant",
        )

    def prepare(self) -> float:
        """Begin a gradient step and return the global gradient norm before clipping.

        The norm counts one copy of a parameter that several ranks hold, so it can be finite here while another copy's
        gradient is not: this returns NaN on the rank that holds such a copy. The caller decides for all ranks whether to
        `step`; without it, neither parameters nor Adam's state change. Collective: gradient norm over the
        model-parallel group (with the distributed optimizer, over all ranks).
        """
        self.scheduler.step(increment=1)
        found_inf = self.megatron.prepare_grads()
        norm = float(self.megatron.get_grad_norm())
        return math.nan if found_inf or not self._copies_are_finite() else norm

    def step(self, norm: float) -> None:
        """Clip by the norm that `prepare` returned, and move the parameters. Every rank must call it, or none.

        Collective: with the distributed optimizer, the all-gather of parameters over the data-parallel group.
        Source: the order of ChainedOptimizer.step (megatron-core 0.16.1), which would apply a NaN in fp32.
        """
        for part in self._parts:
            if self.config.clip_grad > 0 and (parameters := part.get_parameters()):
                clip_grad_by_total_norm_fp32(parameters, max_norm=self.config.clip_grad, total_norm=norm)
        assert self.megatron.step_with_ready_grads(), "only a loss scale could refuse, and there is none"

    def _copies_are_finite(self) -> bool:
        """Whether the gradients that the norm may leave out are finite: of parameters that no tensor-parallel rank cuts,
        and of the last stage's copy of a tied embedding."""
        copies = [
            parameter.grad
            for part in self._parts
            for parameter in part.get_parameters()
            if parameter.grad is not None
            and (not getattr(parameter, "tensor_model_parallel", False) or getattr(parameter, "shared", False))
        ]
        return math.isfinite(float(torch.nn.utils.get_total_norm(copies)))

    @property
    def lr(self) -> float:
        return float(self.megatron.param_groups[0]["lr"])

    def tensors(self) -> Iterator[torch.Tensor]:
        """All tensors of the state: moments and step counts, and the parameters that are stepped (fp32 copies, in bf16)."""
        for part in self._parts:
            for group in part.optimizer.param_groups:
                yield from group["params"]
            for values in part.optimizer.state.values():
                yield from (value for value in values.values() if isinstance(value, torch.Tensor))

    def sharded_state(self, model_state: dict[str, Any], metadata: dict[str, Any], *, loading: bool) -> dict[str, Any]:
        """What a distributed checkpoint stores, or with `loading` the frame it is read into.

        `model_state` is the policy's sharded state. Valid before the first gradient step, too. Collectives: with the
        distributed optimizer, gathers over the data-parallel group.
        """
        for part in self._parts:
            _allocate_state(part.optimizer)
        whole = self.megatron.sharded_state_dict(model_state, is_loading=loading, metadata=metadata)
        mapped = (ShardedBase, LocalNonpersistentObject)
        tensors, self._own_rest = extract_matching_values(whole, lambda value: isinstance(value, mapped))
        counts = [step for part in self._parts if (step := _adam_step(part.optimizer)) is not None]
        return {"tensors": tensors, "adam_step": max(counts, default=0.0), "num_updates": self.scheduler.num_steps}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes a read `sharded_state`: moments, master weights and position. Everything else is this run's own: learning
        rate, decay and betas may change on resuming, and so may the number of chained optimizers, which upstream makes
        one for the experts' parameters only where expert_parallel > 1."""
        counted = ("params", "step")
        configured = [{k: v for k, v in group.items() if k not in counted} for group in self.megatron.param_groups]
        whole = merge(self._own_rest, state["tensors"])
        states = [whole] if len(self._parts) == 1 else [whole[index] for index in range(len(self._parts))]
        for part, part_state in zip(self._parts, states, strict=True):
            _load_part(part, part_state, state["adam_step"])
        for group, own in zip(self.megatron.param_groups, configured, strict=True):
            group.update(own)
        self.scheduler.num_steps = 0
        self.scheduler.step(increment=state["num_updates"])

    @property
    def _parts(self) -> list[MegatronOptimizer]:
        return self.megatron.chained_optimizers


def _allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Gives an optimizer that has not stepped yet its state, all zero.

    Upstream (0.16.1) can neither save nor load torch's AdamW before its first step. A step without gradient at learning
    rate 0 creates the state and changes nothing else.
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
    _set_adam_step(optimizer, 0.0)


def _counts_per_parameter(optimizer: torch.optim.Optimizer) -> bool:
    """Whether steps are counted for each parameter (torch's AdamW) or each group (Transformer Engine's FusedAdam)."""
    return any("step" in state for state in optimizer.state.values())


def _adam_step(optimizer: torch.optim.Optimizer) -> float | None:
    """Steps taken; None for an optimizer without parameters."""
    counted = optimizer.state.values() if _counts_per_parameter(optimizer) else optimizer.param_groups
    return next((float(entry["step"]) for entry in counted if "step" in entry), None)


def _set_adam_step(optimizer: torch.optim.Optimizer, step: float) -> None:
    """Gives every parameter its own count, or every group."""
    if _counts_per_parameter(optimizer):
        for state in optimizer.state.values():
            state["step"] = torch.tensor(step)
    else:
        for group in optimizer.param_groups:
            group["step"] = int(step)


def _load_part(part: MegatronOptimizer, state: dict[str, Any], step: float) -> None:
    """Loads one of the chained optimizers; works around upstream's handling of AdamW's per-parameter `step` (0.16.1).

    The plain optimizer does not store a step of 0. The distributed one loads moments only where no `step` is beside
    them, and gives all parameters one shared `step` tensor, which would advance once per parameter in every update.
    """
    optimizer = part.optimizer
    per_parameter = _counts_per_parameter(optimizer)
    moments = state.pop("param_state", None)
    if moments is None and per_parameter:
        state.get("optimizer", state)["state"]["common_step"] = torch.tensor(step)
    part.load_state_dict(state)
    if moments is not None:
        for values in optimizer.state.values():
            values.pop("step", None)
        part.load_parameter_state_from_fully_reshardable(moments)
    if per_parameter:
        for values in optimizer.state.values():
            values["step"] = torch.tensor(step)
    else:
        _set_adam_step(optimizer, step)
