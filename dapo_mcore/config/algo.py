"""The section `algo`: advantages, the policy loss, and corrections of the engine's mismatch.

Change here: what a user may set about the objective, its default, and a rule inside the section.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dapo_mcore.config.values import Section

LossMode = Literal[
    "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "token-mean-microbatch"
]


class KLConfig(Section):
    """KL to the frozen starting policy. Off by default, as in the paper."""

    coef: float = Field(0.0, ge=0, le=1000)
    """0: no KL term and no reference policy."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Of single tokens, as in verl: k3 is cut at 10 nats, with its gradient (kernels/policy_loss/torch_path.py)."""
    place: Literal["loss", "reward"] = "loss"
    """In the loss, or subtracted from the rewards of the tokens."""


class TISConfig(Section):
    """Correction of the engine's log-prob mismatch by importance weights w = exp(old_actor - rollout) (algo/correction.py)."""

    mode: Literal["off", "truncate", "icepop", "mask"] = "off"
    """truncate: the weight is w clamped to [lower, cap]. icepop: it is w where lower ≤ w ≤ cap, else 0. mask: it is 1 there, else 0.
    Tokens of weight 0 still count in the loss's divisor."""
    lower: float | None = Field(None, ge=0)
    """null: 0 in mode truncate, else 1/cap."""
    cap: float | None = Field(2.0, gt=0)
    """null: no upper bound. Truncated at null, the weights are importance weights without bounds, as NeMo-RL's are by default."""
    level: Literal["token", "sequence", "geometric"] = "token"
    """What w is of: token: each token. sequence: the product of w over a response's tokens, for each of them. geometric: its
    geometric mean. The last two score the first mini-batch, too."""
    normalize: bool = False
    """Divide the weights of a rollout step by their mean: over loss tokens, or with another level over responses. mode truncate."""

    @model_validator(mode="after")
    def _check_bounds(self) -> TISConfig:
        if self.lower is not None and self.cap is not None and self.lower > self.cap:
            raise ValueError(
                f"lower {self.lower} exceeds cap {self.cap}, so no weight lies between them; exchange them"
            )
        if self.mode not in ("icepop", "mask"):
            return self
        if self.lower is None and self.cap is not None and self.cap < 1:
            raise ValueError(
                f"mode {self.mode} keeps weights from lower to cap, and lower is 1/cap unless it is set: no token meets that at cap "
                f"{self.cap}; use a cap of at least 1, or set lower"
            )
        if not self.lower and self.cap is None:
            raise ValueError(f"mode {self.mode} has neither lower nor cap, so it keeps all tokens; set at least one")
        return self


class RejectionConfig(Section):
    """One criterion of what is not trained on, because engine and actor disagree about it (algo/rejection.py). r = exp(old_actor -
    rollout) of a token. Rejected tokens have no policy, KL and entropy term; `rejection_divisor` says whether they are counted.
    With advantage gae they stay steps of the response, so that earlier tokens keep the values and rewards after them; only whitening
    leaves them out. verl leaves them out of the recursion, and with a rejected last token the response loses its reward."""

    level: Literal["token", "sequence", "geometric", "every"]
    """What is compared with the bounds. token: each token. sequence: the product of r over a response, or the sum of k2 or k3.
    geometric: the geometric mean of r, or the mean of k2 or k3. every: each token, but one out of bounds rejects its whole response:
    a veto is `{level: every, lower: 1e-4}`."""
    measure: Literal["ratio", "k2", "k3"] = "ratio"
    """ratio: r. k2: (log r)² / 2. k3: r - 1 - log r. The last two are divergences: at least 0, and 0 where both agree."""
    lower: float | None = Field(None, gt=0)
    """Smallest value that is kept; null: none."""
    upper: float | None = Field(None, gt=0)
    """Largest value that is kept; null: none."""

    @model_validator(mode="after")
    def _check_bounds(self) -> RejectionConfig:
        if self.lower is None and self.upper is None:
            raise ValueError(f"level {self.level} has neither lower nor upper, so it rejects nothing; set at least one")
        if self.lower is not None and self.upper is not None and self.lower > self.upper:
            raise ValueError(f"lower {self.lower} exceeds upper {self.upper}, so everything is rejected; exchange them")
        if self.measure != "ratio" and self.lower is not None:
            raise ValueError(
                f"lower {self.lower} is a bound of measure ratio; a divergence such as {self.measure} is 0 where engine and actor "
                "agree, so only upper rejects disagreement: leave lower out"
            )
        return self


class KLCovConfig(Section):
    """KL-Cov (arXiv 2505.22617): of a mini-batch's loss tokens, those with the largest covariance of log-prob and advantage pay a
    penalty for leaving the old policy (algo/covariance.py)."""

    ratio: float = Field(0.0002, gt=0, le=1)
    """Share of the loss tokens that pay, at least one token."""
    coef: float = Field(1.0, gt=0, le=1000)
    """Of |log-prob - old log-prob|, in the token's loss."""


class ClipCovConfig(Section):
    """Clip-Cov (arXiv 2505.22617): some loss tokens of a mini-batch whose covariance of log-prob and advantage lies between the
    bounds, drawn at random, get no gradient (algo/covariance.py)."""

    ratio: float = Field(0.0002, gt=0, le=1)
    """Share of the loss tokens that are drawn, at least one token if any lies between the bounds."""
    lower: float = 1.0
    """Lower bound of the covariances to choose from."""
    upper: float = 5.0
    """Upper bound of them."""

    @model_validator(mode="after")
    def _check_bounds(self) -> ClipCovConfig:
        if self.lower >= self.upper:
            raise ValueError(f"lower {self.lower} must be below upper {self.upper}: no token lies between them")
        return self


class AdaptiveEntropyConfig(Section):
    """An entropy coefficient that follows a target (Skywork-OR1, arXiv 2505.22312; algo/adaptive_entropy.py)."""

    target: float = Field(gt=0)
    """Nats per token, compared with -log p of the rollout step's loss tokens, mean. Above it the bonus is off."""
    delta: float = Field(0.0001, gt=0, le=1)
    """Added to the coefficient after a rollout step below the target, and subtracted after another."""
    max_coef: float = Field(0.005, ge=0, le=10)
    """Largest coefficient."""
    min_coef: float = Field(0.0, ge=0, le=10)
    """Smallest coefficient."""

    @model_validator(mode="after")
    def _check_bounds(self) -> AdaptiveEntropyConfig:
        if self.min_coef > self.max_coef:
            raise ValueError(f"min_coef {self.min_coef} exceeds max_coef {self.max_coef}; exchange them")
        return self


class AlgoConfig(Section):
    """The objective. Defaults are the paper's."""

    clip_low: float = Field(0.2, ge=0, le=1)
    """The ratio's lower bound is 1 - clip_low."""
    clip_high: float = Field(0.28, ge=0)
    """The ratio's upper bound is 1 + clip_high (clip-higher, paper section 3.1)."""
    dual_clip: float | None = Field(None, gt=1)
    """Bound c > 1 of the loss for negative advantages (verl's clip_ratio_c); null: none."""
    policy_loss: Literal["clip", "cispo", "gspo", "kl_cov", "clip_cov"] = "clip"
    """clip: PPO's and DAPO's, a ratio per token. cispo (arXiv 2506.13585): the clipped ratio only weighs a token's log-prob,
    so that clipped tokens keep a gradient; the paper clips above only, which is clip_low 1. With clip_low and clip_high 0 it is
    REINFORCE, -A · log π. gspo (arXiv 2507.18071): one
    ratio per response, exp(mean log-ratio of its tokens); set clip_low and clip_high to about 3e-4 and 4e-4. Wherever old
    log-probs were scored or come from the engine, gspo projects to the vocabulary once more. kl_cov: no clipping; section kl_cov.
    clip_cov: as clip; section clip_cov. Both score each mini-batch with the weights of its gradient step, a third more work."""
    kl_cov: KLCovConfig = KLCovConfig()
    clip_cov: ClipCovConfig = ClipCovConfig()
    loss_mode: LossMode = "token-mean"
    """How the tokens' losses become one number: the mean over all tokens of the mini-batch, or over sequences first."""
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
    advantage_std: Literal["unbiased", "biased", "others", "none", "batch"] = "unbiased"
    """Of the group: with divisor n - 1 or n, or none. others: that of the other responses, NeMo-RL's default. batch: that of all loss
    tokens of the rollout step, around their mean (REINFORCE++ with a group baseline, arXiv 2501.03262)."""
    advantage_baseline: Literal["mean", "leave-one-out"] = "mean"
    """What is subtracted from a response's reward."""
    advantage_eps: float = Field(1e-6, ge=0, le=1)
    """Added to the standard deviation that advantages are divided by."""
    entropy_coef: float = Field(0.0, ge=0, le=10)
    """Weight of the entropy bonus. With adaptive_entropy its first value."""
    adaptive_entropy: AdaptiveEntropyConfig | None = None
    old_logprobs: Literal["actor", "rollout"] = "actor"
    """actor: those of the policy before the rollout step. The first gradient step finds its own, so only the mini-batches after
    it cost a scoring pass (all of them with kl.place=reward, or where several epochs replay routes). rollout: those of the engine."""
    max_mismatch: float | None = Field(None, gt=0)
    """A larger mean |log-prob of actor - of rollout engine| of a step's loss tokens, in nats, ends the run before it trains
    on them: before the optimizer's first step. With old_logprobs=rollout the actor then scores the mini-batches after the
    first. With and without a limit, a mean above 0.1 at the first step after a start gives a warning."""
    kl: KLConfig = KLConfig()
    tis: TISConfig = TISConfig()
    rejection: list[RejectionConfig] = Field(default_factory=list)
    """Criteria of what is not trained on; a token must pass all of them. Scores the first mini-batch, too."""
    rejection_divisor: Literal["kept", "all"] = "kept"
    """The loss tokens, and the responses that have any, that loss_mode divides by. kept: those not rejected, as in verl. all: rejected
    ones, too, as in slime and NeMo-RL: the more are rejected, the smaller the gradient."""

    @property
    def penalises_rewards(self) -> bool:
        """True if the KL penalty is in the reward."""
        return self.kl.coef > 0 and self.kl.place == "reward"

    @property
    def reads_policy_logprobs(self) -> bool:
        """True if gradient steps read log-probs of the policy before the rollout step."""
        reads = self.old_logprobs == "actor" or self.tis.mode != "off" or bool(self.rejection)
        return reads or self.max_mismatch is not None

    @property
    def corrects_before(self) -> bool:
        """True if the correction of a token depends on others, so that it is computed before the first gradient step."""
        weighs = self.tis.mode != "off" and (self.tis.level != "token" or self.tis.normalize)
        return weighs or bool(self.rejection)

    @property
    def selects_by_covariance(self) -> bool:
        """True if a gradient step treats some tokens of its mini-batch otherwise, by their covariance."""
        return self.policy_loss in ("kl_cov", "clip_cov")
