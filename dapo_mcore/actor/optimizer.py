"""AdamW and its schedule, as Megatron runs them over the mesh."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from dapo_mcore.actor import optimizer_state
from dapo_mcore.actor.optimizer_state import Shard
from dapo_mcore.config import schema as settings


class Optimizer:
    """Megatron's optimizer with its scheduler. Gradient steps count from 1: step u uses lr · min(1, u / warm-up)."""

    def __init__(self, model: DistributedDataParallel, config: settings.OptimizerConfig, dtype: torch.dtype):
        self.config = config
        self._parameters = list(model.parameters())
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
        moved = self.megatron.step_with_ready_grads()
        assert moved, "only a loss scale could refuse, and there is none"

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

    def shards(self) -> Iterator[Shard]:
        """Yield the state that this rank holds; valid before the first gradient step, too. No communication."""
        return optimizer_state.shards(self._parts, self._parameters)

    @property
    def adam_step(self) -> float:
        """Updates that Adam has made on this rank's parameters: skipped ones don't count. 0 on a rank without any."""
        return optimizer_state.adam_step(self._parts)

    def resume_at(self, adam_step: float, num_updates: int) -> None:
        """Take up the counts of a checkpoint whose tensors are in `shards`. Rates, decay and betas stay this run's own."""
        optimizer_state.set_adam_step(self._parts, adam_step)
        self.scheduler.num_steps = 0
        self.scheduler.step(increment=num_updates)

    @property
    def _parts(self) -> list[MegatronOptimizer]:
        return self.megatron.chained_optimizers
