"""The section `critic`: the value model of PPO, trained beside the policy when algo.advantage is gae.

Change here: what a user may set about the critic, and its default.
"""

from __future__ import annotations

from pydantic import Field

from dapo_mcore.config.optimizer import OptimizerConfig
from dapo_mcore.config.values import Section


class CriticConfig(Section):
    """A second model over the same parallel layout, with the policy's starting weights and a value head that starts at 0.

    Costs the memory of another policy: weights, gradients and optimizer state; and its own scoring and gradient steps.
    """

    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-5)
    warmup_steps: int = Field(0, ge=0, le=1_000_000_000)
    """The policy is not trained in the first rollout steps, this many: its advantages would be those of an untrained critic."""
    clip: float | None = Field(0.5, gt=0)
    """A value further than this from the one before the rollout step gets no gradient if that one was nearer to the return. null: no
    such bound."""
