"""Token weights: all of the loss normalisation.

Change here: how the token losses of a mini-batch become one number. The kernels compute each token's loss; every mode
below is only a weight, and loss = Σ weight · token_loss over all loss tokens of the mini-batch on all ranks. The weights
are known before the first forward pass and need no collective. So micro-batch size, packing, and tensor, pipeline,
context and data parallelism cannot change the objective (except in the compatibility mode `token-mean-microbatch`).
"""

from __future__ import annotations

import numpy as np

from dapo_mcore.config.algo import LossMode


def sample_weights(
    mode: LossMode,
    num_loss_tokens: np.ndarray,
    *,
    micro_batch_ids: np.ndarray | None = None,
    loss_length: int | None = None,
) -> np.ndarray:
    """Return float64 [n], the weight of each loss token of each sample of a mini-batch (of all data-parallel ranks).

    num_loss_tokens  int64 [n], n_b below. N = Σ n_b, an exact count, at least 1.
    micro_batch_ids  int64 [n], for token-mean-microbatch; unique over data-parallel ranks.
    loss_length      the constant of seq-mean-token-sum-norm, in tokens.

    With S the number of samples that have a loss token:
      token-mean               1 / N                    DAPO eq. 8, over the batch as verl does
      seq-mean-token-mean      1 / (S · n_b)            GRPO
      seq-mean-token-sum       1 / S
      seq-mean-token-sum-norm  1 / (S · loss_length)    Dr. GRPO
      token-mean-microbatch    (samples in the micro-batch / n) / (loss tokens in the micro-batch)

    The first four equal agg_loss of verl 0.9.1 (trainer/ppo/core_algos.py), except that S does not count samples without
    a loss token; verl's trainer divides by all sequences of the mini-batch. verl up to 0.7 divided
    seq-mean-token-sum-norm by the length alone, so its learning rates are for a gradient S times as large.

    A sample without loss tokens gets 0 and is not counted, except in token-mean-microbatch. That mode repeats verl at
    4f80e46 (workers/actor/dp_actor.py), the code of the published run. A token's weight there depends on its
    micro-batch, so use it only to compare.
    """
    tokens = np.asarray(num_loss_tokens, dtype=np.int64)
    trained = tokens > 0
    num_sequences = max(int(trained.sum()), 1)
    if mode == "token-mean":
        weights = np.full(len(tokens), 1.0 / max(int(tokens.sum()), 1))
    elif mode == "seq-mean-token-mean":
        weights = 1.0 / (num_sequences * np.maximum(tokens, 1))
    elif mode == "seq-mean-token-sum":
        weights = np.full(len(tokens), 1.0 / num_sequences)
    elif mode == "seq-mean-token-sum-norm":
        assert loss_length is not None, "seq-mean-token-sum-norm needs loss_length"
        weights = np.full(len(tokens), 1.0 / (num_sequences * loss_length))
    else:
        assert micro_batch_ids is not None, "token-mean-microbatch needs micro_batch_ids"
        weights = _micro_batch_weights(tokens, micro_batch_ids)
    return np.where(trained, weights, 0.0)


def balance_weights(num_loss_tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return float64 [n], the weight of each sample's load-balancing loss: 1 / (S · T_b²), or 0 without loss tokens.

    num_loss_tokens, lengths  int64 [n], of all samples of a mini-batch. S counts those with a loss token; T_b is the length.
    Both of the loss's factors, loads and scores, are sums over the sample's tokens (actor/model/routing.py).
    """
    trained = np.asarray(num_loss_tokens) > 0
    return np.where(trained, 1.0 / (max(int(trained.sum()), 1) * np.asarray(lengths, dtype=np.float64) ** 2), 0.0)


def _micro_batch_weights(tokens: np.ndarray, micro_batch_ids: np.ndarray) -> np.ndarray:
    _, index, num_samples = np.unique(micro_batch_ids, return_inverse=True, return_counts=True)
    loss_tokens = np.zeros(len(num_samples), dtype=np.int64)
    np.add.at(loss_tokens, index, tokens)
    return (num_samples / len(tokens) / np.maximum(loss_tokens, 1))[index]
