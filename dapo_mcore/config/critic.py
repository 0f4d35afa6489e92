"""The section `critic`: the value model of PPO, trained beside the policy when algo.advantage is gae.

Change here: what a user may set about the critic, and its default.
"""

from __future__ import annotations

from pydantic import Field

from dapo_mcore.config.optimizer import OptimizerConfig
from dapo_mcore.config.values import LearningRate, Section


class CriticOptimizerConfig(OptimizerConfig):
    """The keys of the section `optimizer`, for the critic alone: it takes no value from there."""

    lr: LearningRate = 1e-5
    """Peak of the learning rate."""


class CriticConfig(Section):
    """A second model over the same parallel layout, with the policy's starting weights and a value head that starts at 0.

    Costs the memory of a second policy (weights, gradients, optimizer state), and per rollout step a forward pass over all samples
    and as many gradient steps as the policy takes.
    """

    optimizer: CriticOptimizerConfig = CriticOptimizerConfig()
    warmup_steps: int = Field(0, ge=0, le=1_000_000_000)
    """Rollout steps at the start that train the critic alone, because the values of an untrained one mislead the policy."""
    clip: float | None = Field(0.5, gt=0)
    """The loss is the larger of two squared errors: the value's, and that of the value clipped to this distance from the one before
    the rollout step. null: the value's alone."""
