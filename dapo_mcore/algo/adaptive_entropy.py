"""The entropy coefficient that follows a target entropy.

Change here: how the coefficient moves. actor/actor.py holds it, and a checkpoint stores it.
Source: EntController of Skywork-OR1 64e96af (verl/trainer/ppo/core_algos.py), arXiv 2505.22312. It compares the target with -log p
of the policy before the rollout step, averaged over the step's loss tokens; ours with that of the policy at each token's first
gradient step. Its entropy term is a mean over the tokens of a micro-batch; ours follows algo.loss_mode, over the mini-batch. Its
checkpoints do not hold the coefficient; ours do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dapo_mcore.config.algo import AdaptiveEntropyConfig


@dataclass(frozen=True, slots=True)
class EntropyCoef:
    """The coefficient, and whether the next rollout step uses it: it does not where the entropy was above the target."""

    value: float
    enabled: bool = True

    @property
    def used(self) -> float:
        return self.value if self.enabled else 0.0

    def after(self, entropy: float, config: AdaptiveEntropyConfig) -> EntropyCoef:
        """Return the coefficient after a rollout step with this entropy, in nats; the same if it is not finite.

        Example: target 0.2, delta 1e-4, max_coef 0.005: value 0.001 becomes 0.0011 and is used at entropy 0.15, 0.0009 and is not
        used at 0.2.
        """
        if not math.isfinite(entropy):
            return self
        low = entropy < config.target
        moved = self.value + config.delta if low else self.value - config.delta
        return EntropyCoef(min(max(moved, config.min_coef), config.max_coef), low)
