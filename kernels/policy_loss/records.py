"""Records of the policy loss: the objective's constants, the inputs per token and the results per token.

Change here: a field of the loss. torch_path.py (PyTorch) and kernel.py (Triton) compute these records.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]
Form = Literal["clip", "cispo"]

# exp(20) is 4.9e8: far beyond every clip range, yet finite in each dtype, times any advantage.
LOG_RATIO_LIMIT = 20.0
K3_LIMIT = 10.0


@dataclass(frozen=True, slots=True)
class Objective:
    """Constants of the objective.

    clip_low, clip_high  the ratio is clipped to [1 - clip_low, 1 + clip_high]; with clip_low 1 only above.
    dual_clip            c > 1: for a negative advantage A the loss is at most -A·c. None: no such bound.
    kl_coef              weight of the KL to the reference policy, estimated per token by `kl_estimator`.
    entropy_coef         weight of the entropy bonus, which is subtracted from the loss.
    form                 "clip": PPO's, a clipped token has no gradient. "cispo": the clipped ratio is a constant weight of the
                         log-prob, so every token has a gradient; dual_clip does not go with it.
    Raises ValueError for values outside these ranges.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k3"
    entropy_coef: float = 0.0
    form: Form = "clip"

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low <= 1 or self.clip_high < 0:
            raise ValueError(
                f"clip_low {self.clip_low} must be in [0, 1] and clip_high {self.clip_high} at least 0: "
                f"the ratio is clipped to [1 - clip_low, 1 + clip_high]"
            )
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip {self.dual_clip} must be above 1 (10 is common); None switches it off")
        if self.kl_estimator not in ("k1", "k2", "k3"):
            raise ValueError(f"kl_estimator {self.kl_estimator!r} is unknown; use 'k1', 'k2' or 'k3'")
        if self.form not in ("clip", "cispo"):
            raise ValueError(f"form {self.form!r} is unknown; use 'clip' or 'cispo'")
        if self.form == "cispo" and self.dual_clip is not None:
            raise ValueError(f"dual_clip {self.dual_clip} bounds the loss of form clip; form cispo has none: use None")


class TokenInputs(NamedTuple):
    """Constants of each token beside its log-prob: floating tensors [T].

    advantages     A in the policy term.
    token_weights  multiply every term; they hold the normalisation (1/N) and the masks.
    old_logprobs   None means the token's own log-prob, detached: the ratio is exactly 1, and with advantages 1 the gradient
                   is that of weighted cross-entropy.
    ref_logprobs   log-probs of the reference policy; needed only for a KL.
    tis_weights    importance weights; they multiply only the policy term.
    old_kl_coefs   of |logp - old_logprobs|, which belongs to the policy term (KL-Cov, arXiv 2505.22617).
    """

    advantages: Tensor
    token_weights: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    tis_weights: Tensor | None = None
    old_kl_coefs: Tensor | None = None

    def rows(self, rows: slice) -> TokenInputs:
        """Return the inputs of some of the tokens."""
        return TokenInputs(*(tensor if tensor is None else tensor[rows] for tensor in self))

    def checked(self, like: Tensor, objective: Objective) -> TokenInputs:
        """Return the inputs, detached and converted to the dtype of `like` [T].

        Raises ValueError if a shape, dtype or device does not fit, or if the objective needs an input that is None.
        """
        if objective.kl_coef and self.ref_logprobs is None:
            raise ValueError(f"kl_coef {objective.kl_coef} needs ref_logprobs [{len(like)}], which is None")
        return TokenInputs(*(_convert(name, tensor, like) for name, tensor in self._asdict().items()))


class TokenTerms(NamedTuple):
    """The objective of each token, before token weights and entropy bonus; every tensor [T].

    loss           policy term (times the TIS weight) + kl_coef · kl.
    grad_logprobs  d loss / d logprobs.
    ratio          exp(logprobs - old_logprobs), with the difference clamped to ±20.
    clipped_low    bool: A < 0 and ratio < 1 - clip_low, so the policy term has no gradient. Form cispo: ratio < 1 - clip_low.
    clipped_high   bool: A > 0 and ratio > 1 + clip_high, so the policy term has no gradient. Form cispo: ratio > 1 + clip_high.
    clipped_dual   bool: A < 0 and ratio > dual_clip, so the policy term has no gradient.
    kl             estimate of the KL to the reference policy in nats; 0 without reference log-probs.
    """

    loss: Tensor
    grad_logprobs: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    clipped_dual: Tensor
    kl: Tensor


class PolicyLossOutput(NamedTuple):
    """The differentiable scalar loss, and the fields of TokenTerms, detached."""

    loss: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    clipped_dual: Tensor
    kl: Tensor


class PolicyHeadOutput(NamedTuple):
    """The loss computed from logits or hidden states, and the results per token, [T] each and detached.

    loss      the differentiable scalar. Inside an implementation it is [n], the summand of each token:
              token weight · (TokenTerms.loss - entropy_coef · entropy).
    logprobs  log-prob of the target in nats.
    entropy   entropy of the whole distribution in nats.
    The other fields are those of TokenTerms.
    """

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    clipped_dual: Tensor
    kl: Tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return float64 for a float64 tensor and float32 for any narrower one."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _convert(name: str, tensor: Tensor | None, like: Tensor) -> Tensor | None:
    if tensor is None:
        return None
    if tensor.shape != like.shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, but there are {len(like)} tokens: give [{len(like)}]")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}; give a floating type, float32 for preference")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, but the tokens are on {like.device}; move it there")
    return tensor.detach().to(like.dtype)
