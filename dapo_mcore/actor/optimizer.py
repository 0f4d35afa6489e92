"""AdamW on this rank: gradient steps, the learning-rate schedule, and the optimizer state.

Change here: anything that differs between Megatron's optimizers (plain or distributed, with torch's AdamW or Transformer
Engine's FusedAdam, or hybrid: a part of the state on the host).
"""

from __future__ import annotations

import importlib.util
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from dapo_mcore.config import optimizer as settings
from dapo_mcore.errors import ConfigError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class OptimizerShard(NamedTuple):
    """The state of elements start … start + n - 1 of a flattened parameter, as views of live tensors.

    parameter   the model's own tensor
    start       0 with the plain optimizer, which holds all elements on every data-parallel rank
    state       flat tensors of n elements by name: `exp_avg`, `exp_avg_sq`, and, if the parameter is not fp32 itself, its
                fp32 copy `param`, which the optimizer updates
    is_divided  True if each data-parallel rank holds a different slice (the distributed optimizer)
    """

    parameter: Tensor
    start: int
    state: dict[str, Tensor]
    is_divided: bool


class Optimizer:
    """Megatron's optimizer with its scheduler. Gradient steps count from 1: step u uses lr · min(1, u / warm-up).

    Skipped steps are not counted. So the schedule and Adam's bias correction count the same steps, and a run continues after a
    skipped step as if it had never had that mini-batch.
    """

    def __init__(self, chunks: list[DistributedDataParallel], config: settings.OptimizerConfig, dtype: torch.dtype):
        if config.saves_memory:
            check_memory_support()
        self.config = config
        # Megatron's precision-aware optimizers read fp32 gradients of bf16 parameters from an attribute of its own
        self._gradient = "decoupled_grad" if config.saves_memory else "grad"
        self._parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        self.megatron: MegatronOptimizer = get_megatron_optimizer(
            _upstream_config(config, dtype), chunks, use_gloo_process_groups=False
        )
        # upstream exempts norms and biases from weight decay only through this scheduler, which applies their group's factor
        self.scheduler = OptimizerParamScheduler(
            self.megatron,
            init_lr=0.0,
            max_lr=config.lr,
            min_lr=config.min_lr,
            lr_warmup_steps=config.warmup_updates,
            lr_decay_steps=config.decay_updates if config.schedule == "cosine" else config.warmup_updates + 1,
            lr_decay_style=config.schedule,
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=1,
            wd_incr_style="constant",
        )

    def prepare(self) -> float:
        """Begin a gradient step and return the global gradient norm before clipping.

        Returns NaN on a rank with a gradient that is not finite. Another rank's norm may be finite all the same, because the
        norm counts only one copy of a parameter that several ranks hold. So the caller decides for all ranks whether to call
        `step` or `skip`; until `step`, neither parameters nor Adam's state change. Collective: the gradient norm over the
        model-parallel group (with the distributed optimizer, over all ranks).
        """
        self.scheduler.step(increment=1)
        found_inf = self.megatron.prepare_grads()
        norm = float(self.megatron.get_grad_norm())
        return math.nan if found_inf or not self._copies_are_finite() else norm

    def step(self, norm: float) -> None:
        """Clip by the norm that `prepare` returned, and update the parameters. Either every rank calls it, or none.

        Collective: with the distributed optimizer, the all-gather of parameters over the data-parallel group.
        Source: the order of ChainedOptimizer.step (megatron-core 0.16.1), which would apply a NaN in fp32.
        """
        for part in self._parts:
            if self.config.clip_grad > 0 and (parameters := part.get_parameters()):
                clip_grad_by_total_norm_fp32(
                    parameters, self.config.clip_grad, norm, use_decoupled_grad=self.config.saves_memory
                )
        updated = self.megatron.step_with_ready_grads()
        assert updated, "only a loss scale could refuse the step, and there is none"

    def skip(self) -> None:
        """End a gradient step that `prepare` began, without an update. The next step uses its learning rate."""
        self.scheduler.step(increment=-1)

    @property
    def lr(self) -> float:
        """Return the learning rate of the current gradient step."""
        return float(self.megatron.param_groups[0]["lr"])

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors of the state: moments, step counts, and the updated parameters (in bf16 runs, fp32 copies)."""
        for part in self._parts:
            for group in part.optimizer.param_groups:
                yield from group["params"]
            for values in part.optimizer.state.values():
                yield from (value for value in values.values() if isinstance(value, Tensor))

    def shards(self) -> Iterator[OptimizerShard]:
        """Yield the state that this rank holds. No communication.

        Creates the state, all zero, if the optimizer has not stepped yet.
        """
        for part in self._parts:
            _allocate(part.optimizer, self._gradient)
        for parameter, main, start, is_divided in self._updated_tensors():
            state = next(part.optimizer.state[main] for part in self._parts if main in part.optimizer.state)
            tensors = {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
            if parameter.dtype != torch.float32:
                tensors["param"] = state.get("master_param", main).detach()
            flat = {name: value.view(-1) for name, value in tensors.items()}
            yield OptimizerShard(parameter, start, flat, is_divided)

    def gradients(self) -> Iterator[OptimizerShard]:
        """Yield this rank's gradients after `prepare`, each as the state `gradient` of its parameter. No communication."""
        for parameter, main, start, is_divided in self._updated_tensors():
            if (gradient := getattr(main, self._gradient, None)) is not None:
                yield OptimizerShard(parameter, start, {"gradient": gradient.detach().view(-1)}, is_divided)

    @property
    def adam_step(self) -> float:
        """Return the number of updates that Adam has made on this rank's parameters, without skipped ones.

        0 on a rank that holds no parameters.
        """
        counts = (
            float(entry["step"])
            for part in self._parts
            for adam in _adams(part.optimizer)
            for entry in (adam.state.values() if _counts_per_parameter(adam) else adam.param_groups)
            if "step" in entry
        )
        return max(counts, default=0.0)

    def resume_at(self, adam_step: float) -> None:
        """Set the count of a checkpoint whose tensors have been copied into `shards`, for Adam and for the schedule.

        Learning rate, weight decay and betas stay those of this run's config.
        """
        for adam in (adam for part in self._parts for adam in _adams(part.optimizer)):
            if _counts_per_parameter(adam):
                for state in adam.state.values():
                    # a tensor of its own: a shared count would advance once per parameter
                    state["step"] = torch.tensor(adam_step)
            else:
                for group in adam.param_groups:
                    group["step"] = int(adam_step)
        self.scheduler.num_steps = 0
        self.scheduler.step(increment=int(adam_step))

    def _copies_are_finite(self) -> bool:
        """Return True if the gradients that the norm may leave out are finite.

        They belong to parameters that tensor parallelism does not split, and to the last stage's copy of a tied embedding.
        """
        copies = [
            gradient
            for part in self._parts
            for parameter in part.get_parameters()
            if (gradient := getattr(parameter, self._gradient, None)) is not None
            and (not getattr(parameter, "tensor_model_parallel", False) or getattr(parameter, "shared", False))
        ]
        return math.isfinite(float(torch.nn.utils.get_total_norm(copies)))

    def _updated_tensors(self) -> Iterator[tuple[Tensor, Tensor, int, bool]]:
        """Yield (model parameter, the tensor that Adam updates for it, that tensor's start in the parameter, is_divided).

        A distributed optimizer's range is the parameter's own (`param`), not that of its bucket: buckets are padded.
        """
        divided = [part for part in self._parts if isinstance(part, DistributedOptimizer)]
        if not divided:
            for parameter in self._parameters:
                yield parameter, getattr(parameter, "main_param", parameter), 0, False
        for part in divided:
            for parameter, main in _pairs(part):
                yield parameter, main, part._get_model_param_range_map(parameter)["param"].start, True

    @property
    def _parts(self) -> list[MegatronOptimizer]:
        """Return the chained optimizers: one for dense parameters, and one for experts if they have groups of their own."""
        return self.megatron.chained_optimizers


def _pairs(part: DistributedOptimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (model parameter, the tensor that Adam updates for it) of a distributed optimizer.

    Each of its groups has fp32 parameters first, such as a critic's head, and then those with fp32 copies; the map numbers both
    in one sequence.
    """
    numbered: dict[int, list[tuple[bool, int, Tensor]]] = defaultdict(list)
    for parameter, (group, number) in part.model_param_group_index_map.items():
        numbered[group].append((parameter.dtype != torch.float32, number, parameter))
    for group, found in numbered.items():
        found.sort(key=lambda entry: entry[:2])
        parameters = (parameter for *_, parameter in found)
        yield from zip(parameters, part.optimizer.param_groups[group]["params"], strict=True)


def _counts_per_parameter(optimizer: torch.optim.Optimizer) -> bool:
    """Return True if steps are counted per parameter (torch's AdamW), False if per group (Transformer Engine's FusedAdam)."""
    return any("step" in state for state in optimizer.state.values())


def _allocate(optimizer: torch.optim.Optimizer, gradient: str) -> None:
    """Create the state of an optimizer that has not stepped yet.

    A step without gradient at learning rate 0 creates it and changes nothing else. `gradient` is the attribute that the
    optimizer reads.
    """
    if optimizer.state:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            setattr(parameter, gradient, torch.zeros_like(parameter) if parameter.numel() else None)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for adam in _adams(optimizer):
        for entry in (*adam.state.values(), *adam.param_groups):
            if "step" in entry:
                entry["step"] = torch.tensor(0.0) if isinstance(entry["step"], Tensor) else 0


def _adams(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Return the optimizers that update parameters: those inside a hybrid one, on the host and on the GPU, or it itself."""
    return optimizer.sub_optimizers if isinstance(optimizer, HybridDeviceOptimizer) else [optimizer]


def _upstream_config(config: settings.OptimizerConfig, dtype: torch.dtype) -> OptimizerConfig:
    memory: dict[str, Any] = {}
    if config.saves_memory:
        memory = dict(
            use_precision_aware_optimizer=True,
            store_param_remainders=False,  # a checkpoint has whole fp32 parameters
            exp_avg_dtype=_DTYPES[config.exp_avg_dtype],
            exp_avg_sq_dtype=_DTYPES[config.exp_avg_sq_dtype],
            optimizer_cpu_offload=config.offload_fraction > 0,
            optimizer_offload_fraction=config.offload_fraction,
        )
    return OptimizerConfig(
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
        **memory,
    )


def check_memory_support() -> None:
    """Raise ConfigError if this process cannot have optimizer state on the host or in bf16."""
    if not torch.cuda.is_available() or importlib.util.find_spec("transformer_engine") is None:
        raise ConfigError(
            "optimizer.offload_fraction and moments in bf16 need a CUDA device and Transformer Engine's FusedAdam; install the "
            "extra `te` on a GPU machine, or set offload_fraction 0, exp_avg_dtype fp32 and exp_avg_sq_dtype fp32"
        )
