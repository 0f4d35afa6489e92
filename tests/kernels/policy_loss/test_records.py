"""The records of the loss: what they refuse, and what they convert."""

from __future__ import annotations

import pytest
import torch
from dapo_mcore.kernels.policy_loss import Objective, TokenInputs
from dapo_mcore.kernels.policy_loss.records import compute_dtype


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"clip_low": 1.1}, "clip_low 1.1"),
        ({"clip_high": -0.1}, "clip_high -0.1"),
        ({"dual_clip": 1.0}, "dual_clip 1.0 must be above 1"),
        ({"kl_estimator": "k4"}, "kl_estimator 'k4' is unknown"),
        ({"form": "clipped"}, "form .clipped. is unknown"),
        ({"form": "cispo", "dual_clip": 3.0}, "dual_clip 3.0 bounds the loss of form clip"),
    ],
)
def test_constants_outside_their_range_are_refused(constants, message):
    with pytest.raises(ValueError, match=message):
        Objective(**constants)


@pytest.mark.parametrize(
    ("inputs", "kl_coef", "message"),
    [
        ({"advantages": torch.zeros(3)}, 0.0, r"advantages has shape \[3\], but there are 2 tokens: give \[2\]"),
        ({"token_weights": torch.ones(2, dtype=torch.bool)}, 0.0, "token_weights is torch.bool; give a floating type"),
        ({"old_logprobs": torch.zeros(2, device="meta")}, 0.0, "old_logprobs is on meta, but the tokens are on cpu"),
        ({}, 0.1, r"kl_coef 0.1 needs ref_logprobs \[2\]"),
    ],
)
def test_inputs_that_do_not_fit_the_tokens_are_refused(inputs, kl_coef, message):
    tokens = TokenInputs(**{"advantages": torch.zeros(2), "token_weights": torch.zeros(2)} | inputs)
    with pytest.raises(ValueError, match=message):
        tokens.checked(torch.zeros(2), Objective(kl_coef=kl_coef))


def test_checked_inputs_are_constants_in_the_dtype_of_the_log_probs():
    weights = torch.tensor([0.5, 0.25], dtype=torch.bfloat16, requires_grad=True)
    tokens = TokenInputs(torch.tensor([1.0, -1.0]), weights)
    checked = tokens.checked(torch.zeros(2, dtype=torch.float64), Objective())
    assert checked.token_weights.dtype == checked.advantages.dtype == torch.float64
    assert checked.token_weights.tolist() == [0.5, 0.25] and not checked.token_weights.requires_grad
    assert checked.old_logprobs is checked.ref_logprobs is checked.tis_weights is None


def test_rows_cut_every_input_alike():
    tokens = TokenInputs(torch.arange(4.0), torch.arange(4.0) + 10, tis_weights=torch.arange(4.0) + 20)
    some = tokens.rows(slice(1, 3))
    assert [x.tolist() for x in (some.advantages, some.token_weights, some.tis_weights)] == [[1, 2], [11, 12], [21, 22]]
    assert some.old_logprobs is None


@pytest.mark.parametrize(
    ("given", "computed"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_narrow_types_are_computed_in_fp32(given, computed):
    assert compute_dtype(torch.zeros(1, dtype=given)) == computed
