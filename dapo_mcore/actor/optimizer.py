"""AdamW and its schedule, as Megatron runs them over the mesh."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
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

    def step(self) -> tuple[bool, float]:
        """(False when the gradient was not finite and the update was skipped, global gradient norm before clipping).

        Collectives: gradient norm over the model-parallel group; with the distributed optimizer, the all-gather of
        parameters over the data-parallel group.
        """
        self.scheduler.step(increment=1)
        done, norm, _ = self.megatron.step()
        return bool(done), float(norm)

    @property
    def lr(self) -> float:
        return float(self.megatron.param_groups[0]["lr"])
