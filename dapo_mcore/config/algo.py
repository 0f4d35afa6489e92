"""The section `algo`: advantages, the policy loss, and corrections of the engine's mismatch.

Change here: what a user may set about the objective, its default, and a rule inside the section.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dapo_mcore.config.values import Section

LossMode = Literal[
    "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "token-mean-microbatch"
]


class KLConfig(Section):
    """KL to the frozen starting policy. Off by default, as in the paper."""

    coef: float = Field(0.0, ge=0, le=1000)
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Of single tokens, as in verl: k3 is cut at 10 nats, with its gradient (kernels/policy_loss/torch_path.py)."""
    place: Literal["loss", "reward"] = "loss"


class TISConfig(Section):
    """Correction of the engine's log-prob mismatch: weight min(exp(old_actor - rollout), cap), or its masked form, in which
    masked tokens still count in the loss's divisor (algo/correction.py)."""

    mode: Literal["off", "truncate", "mask"] = "off"
    cap: float = Field(2.0, gt=0)


class AlgoConfig(Section):
    """The objective. Defaults are the paper's."""

    clip_low: float = Field(0.2, ge=0, le=1)
    clip_high: float = Field(0.28, ge=0)
    dual_clip: float | None = Field(None, gt=1)
    policy_loss: Literal["clip", "cispo", "gspo"] = "clip"
    """clip: PPO's and DAPO's, a ratio per token. cispo (arXiv 2506.13585): the clipped ratio only weighs a token's log-prob,
    so that clipped tokens keep a gradient; the paper clips above only, which is clip_low 1. gspo (arXiv 2507.18071): one
    ratio per response, exp(mean log-ratio of its tokens); set clip_low and clip_high to about 3e-4 and 4e-4. Wherever old
    log-probs were scored or come from the engine, gspo projects to the vocabulary once more."""
    loss_mode: LossMode = "token-mean"
    loss_length: int | None = Field(None, ge=1)
    """The constant of seq-mean-token-sum-norm, which divides by sequences · length, as verl does since 0.8 (before: by the length
    alone); None means rollout.max_response_tokens."""
    advantage: Literal["group", "gae"] = "group"
    """group: a response against the others to its prompt, one number for all its tokens (DAPO, GRPO). gae: generalised advantage
    estimation with a critic (PPO), a number per token, whitened over the rollout step's loss tokens; section `critic`."""
    gamma: float = Field(1.0, ge=0, le=1)
    """gae: the discount per token."""
    lam: float = Field(1.0, ge=0, le=1)
    """gae: λ. 1: the reward minus the value, the least biased. Lower: trust the critic's later values more."""
    advantage_std: Literal["unbiased", "biased", "none", "batch"] = "unbiased"
    """Of the group: with divisor n - 1 or n, or none. batch: that of all loss tokens of the rollout step, around their mean
    (REINFORCE++ with a group baseline, arXiv 2501.03262)."""
    advantage_baseline: Literal["mean", "leave-one-out"] = "mean"
    advantage_eps: float = Field(1e-6, ge=0, le=1)
    entropy_coef: float = Field(0.0, ge=0, le=10)
    old_logprobs: Literal["actor", "rollout"] = "actor"
    """actor: those of the policy before the rollout step. The first gradient step finds its own, so only the mini-batches after
    it cost a scoring pass (all of them with kl.place=reward, or where several epochs replay routes). rollout: those of the engine."""
    max_mismatch: float | None = Field(None, gt=0)
    """A larger mean |log-prob of actor - of rollout engine| of a step's loss tokens, in nats, ends the run before it trains
    on them: before the optimizer's first step. With old_logprobs=rollout the actor then scores the mini-batches after the
    first. With and without a limit, a mean above 0.1 at the first step after a start gives a warning."""
    kl: KLConfig = KLConfig()
    tis: TISConfig = TISConfig()

    @property
    def penalises_rewards(self) -> bool:
        """True if the KL penalty is in the reward."""
        return self.kl.coef > 0 and self.kl.place == "reward"

    @property
    def reads_policy_logprobs(self) -> bool:
        """True if gradient steps read log-probs of the policy before the rollout step."""
        return self.old_logprobs == "actor" or self.tis.mode != "off" or self.max_mismatch is not None
