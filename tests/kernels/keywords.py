"""The public loss functions with the fields of TokenInputs and Objective as keywords: a test can vary one of them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from dapo_mcore.kernels.policy_loss import Objective, PolicyHeadOutput, PolicyLossOutput, TokenInputs
from torch import Tensor

from dapo_mcore.kernels import policy_head
from dapo_mcore.kernels import policy_loss as losses


def split(options: dict[str, Any]) -> tuple[TokenInputs, Objective, dict[str, Any]]:
    """Return the fields of TokenInputs and of Objective as records, and the other options."""
    rest = dict(options)
    tokens = TokenInputs(*(rest.pop(name, None) for name in TokenInputs._fields))
    constants = {field.name: rest.pop(field.name) for field in fields(Objective) if field.name in rest}
    return tokens, Objective(**constants), rest


def policy_loss(logprobs: Tensor, **options: Any) -> PolicyLossOutput:
    tokens, objective, rest = split(options)
    return losses.policy_loss(logprobs, tokens, objective, **rest)


def policy_loss_from_logits(logits: Tensor, targets: Tensor, **options: Any) -> PolicyHeadOutput:
    tokens, objective, rest = split(options)
    return losses.policy_loss_from_logits(logits, targets, tokens, objective, **rest)


def linear_policy_loss(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> PolicyHeadOutput:
    tokens, objective, rest = split(options)
    return policy_head.linear_policy_loss(hidden, weight, targets, tokens, objective, **rest)
