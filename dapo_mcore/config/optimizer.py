"""The section `optimizer`: AdamW, its schedule, and where and how precisely its state is kept.

Change here: what a user may set about the optimizer, its default, and a rule inside the section.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from dapo_mcore.config.parallel import ParallelConfig
from dapo_mcore.config.values import LearningRate, Section, Steps, TwoUnits

_MOST_BETA_IN_BF16 = 0.996
"""1 - beta must exceed 2^-8: half the distance of two neighbours in bf16, relative to a value just above a power of two."""


class OptimizerConfig(Section):
    """AdamW as Megatron runs it. The schedule counts gradient steps; warm-up and decay may be set in rollout steps instead."""

    two_units: ClassVar[tuple[TwoUnits, ...]] = (
        TwoUnits("warmup_updates", "warmup_rollout_steps", default=10),
        TwoUnits("decay_updates", "decay_rollout_steps", default=None),
    )

    lr: LearningRate = 1e-6
    """Peak of the learning rate."""
    min_lr: float = Field(0.0, ge=0, le=1)
    """Where the schedule ends."""
    schedule: Literal["constant", "cosine"] = "constant"
    """What the learning rate does after the warm-up."""
    warmup_updates: int | None = Field(None, ge=0, le=1_000_000_000)
    """Gradient steps in which the learning rate rises. null: as `warmup_rollout_steps` says, or 10."""
    warmup_rollout_steps: int | None = Field(None, ge=0, le=1_000_000)
    """The same in rollout steps, as verl and NeMo-RL count: each has train_batch_prompts / mini_batch_prompts × batch.epochs gradient
    steps. Set one of the two. `dapo-mcore config` prints what follows as `warmup_updates`."""
    decay_updates: Steps | None = None
    """Length of the cosine with its warm-up, in gradient steps. schedule=cosine needs it, or `decay_rollout_steps`."""
    decay_rollout_steps: int | None = Field(None, ge=1, le=1_000_000)
    """The same in rollout steps. Set one of the two."""
    weight_decay: float = Field(0.1, ge=0, le=10)
    """Of AdamW; not on biases and norms."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of Adam's mean."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of Adam's mean square."""
    eps: float = Field(1e-8, gt=0, le=1)
    """Adam's, added to the root of the mean square."""
    clip_grad: float = Field(1.0, ge=0)
    """Largest norm of the gradient over all parameters; longer ones are scaled down to it."""
    max_skipped_updates: int = Field(10, ge=1)
    """A gradient step in which any rank has a loss, log-prob, gradient or other number that is not finite is skipped on all ranks:
    weights, Adam's state and the learning-rate schedule stay as they were. This many such steps in a row end the run."""
    spike_factor: float | None = Field(None, gt=1, le=1e6)
    """Skip a gradient step whose norm before clipping is above this many times the median of the last `spike_window` norms.
    Null: no step is a spike. A run is never blocked: the `max_skipped_updates`-th spike in a row is taken, and the median begins
    anew. Costs nothing. Clipping already bounds a spike's size; this saves the weights from its direction too."""
    spike_window: int = Field(64, ge=8, le=100_000)
    """Number of norms in the median. Nothing is a spike before that many gradient steps."""
    distributed: bool = True
    """Shard optimizer state over data-parallel ranks."""
    offload_fraction: float = Field(0.0, ge=0, le=1)
    """Fraction of the state that is on the host, where torch's AdamW updates it. Saves 12 bytes of GPU memory per parameter whose
    state this rank has, and takes 16 of host memory (fp32 copy, two moments, gradient). Every gradient step moves 8 bytes per
    parameter over PCIe while the GPU waits. Needs bf16, Transformer Engine and `distributed`."""
    exp_avg_dtype: Literal["fp32", "bf16"] = "fp32"
    """bf16 saves 2 of 12 bytes per parameter whose state this rank has. A step still needs 4 bytes for a moment, because Transformer
    Engine's FusedAdam computes in fp32, and rounds the result to nearest. Needs bf16 and `distributed`."""
    exp_avg_sq_dtype: Literal["fp32", "bf16"] = "fp32"
    """The same for the second moment. beta2 0.999 would change it by less than a rounding, so bf16 needs a lower beta2."""

    @property
    def saves_memory(self) -> bool:
        """True if state is on the host or in bf16."""
        return self.offload_fraction > 0 or "bf16" in (self.exp_avg_dtype, self.exp_avg_sq_dtype)

    @model_validator(mode="after")
    def _check_spikes(self) -> OptimizerConfig:
        if self.spike_factor is not None and self.max_skipped_updates < 2:
            raise ValueError(
                f"spike_factor {self.spike_factor:g} with max_skipped_updates {self.max_skipped_updates} would skip nothing: the "
                f"max_skipped_updates-th spike in a row is taken; set max_skipped_updates to at least 2, or spike_factor null"
            )
        return self

    @model_validator(mode="after")
    def _check_memory(self) -> OptimizerConfig:
        if not self.saves_memory:
            return self
        moments = {"exp_avg_dtype": ("beta1", self.beta1), "exp_avg_sq_dtype": ("beta2", self.beta2)}
        low = {key: beta for key, beta in moments.items() if getattr(self, key) == "bf16"}
        if not self.distributed:
            raise ValueError(
                "offload_fraction and moments in bf16 need distributed true; the plain optimizer has neither"
            )
        if self.offload_fraction and low:
            raise ValueError(
                f"{' and '.join(low)} bf16 would be ignored on the host, where moments are fp32; set offload_fraction 0 or fp32"
            )
        for key, (name, beta) in low.items():
            if beta > _MOST_BETA_IN_BF16:
                raise ValueError(
                    f"{key} bf16 with {name} {beta}: a step shrinks the moment by 1 - {name} = {1 - beta:.3g} of itself at most, "
                    f"which bf16 can round away (half a unit is up to 2^-8), so it would grow but not shrink; use {name} of at "
                    f"most {_MOST_BETA_IN_BF16}, or {key} fp32"
                )
        return self


def check_optimizer(section: str, optimizer: OptimizerConfig, dtype: str, parallel: ParallelConfig) -> None:
    """Raise ValueError if the optimizer of `section` contradicts itself, the model's dtype or the layout."""
    if optimizer.schedule == "cosine" and optimizer.decay_updates is None:
        raise ValueError(
            f"{section}.schedule cosine needs {section}.decay_updates, the number of gradient steps of the decay, or "
            "decay_rollout_steps"
        )
    warmup, decay = optimizer.warmup_updates or 0, optimizer.decay_updates or 0
    if optimizer.schedule == "cosine" and decay <= warmup:
        raise ValueError(
            f"{section}.schedule cosine: its length of {decay} gradient steps (decay_updates or decay_rollout_steps) includes the "
            f"warm-up of {warmup} and must be above it; raise it, or shorten the warm-up"
        )
    if optimizer.min_lr > optimizer.lr:
        raise ValueError(
            f"{section}.min_lr {optimizer.min_lr} is above {section}.lr {optimizer.lr}, which decays to it; lower min_lr"
        )
    if optimizer.saves_memory and dtype != "bf16":
        raise ValueError(
            f"{section}.offload_fraction and moments in bf16 are for models in bf16, but model.dtype is {dtype}; set model.dtype "
            "bf16, or leave both at their defaults"
        )
    if parallel.overlap_param_gather and not optimizer.distributed:
        raise ValueError(
            f"parallel.overlap_param_gather needs {section}.distributed true: without it every rank updates all parameters, and "
            "there is nothing to gather; set overlap_param_gather false"
        )
