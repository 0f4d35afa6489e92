"""Token weights: the whole of loss normalisation.

Change here: how a mini-batch's token losses become one number. Kernels own the per-token formula; every mode below is
only a weight, so that loss = Σ weight · token_loss over all loss tokens of the mini-batch, wherever they live. The
weights are known before the first forward and need no collective: micro-batch size, packing, tensor, pipeline, context
and data parallelism cannot change the objective (the compatibility mode `token-mean-microbatch` is the exception).
"""

from __future__ import annotations

import numpy as np

from dapo_mcore.config.sections import LossMode


def sample_weights(
    mode: LossMode,
    num_loss_tokens: np.ndarray,
    *,
    micro_batch_ids: np.ndarray | None = None,
    loss_length: int | None = None,
) -> np.ndarray:
    """float64 [n], the weight of each loss token of every sample of one mini-batch (all data-parallel ranks together).

    num_loss_tokens  int64 [n], n_b below. N = Σ n_b, counted exactly and clamped to 1 once, here.
    micro_batch_ids  int64 [n], for token-mean-microbatch; numbers are unique over data-parallel ranks.
    loss_length      the constant of seq-mean-token-sum-norm, in tokens.

    With S the number of samples that have a loss token:
      token-mean               1 / N                    DAPO eq. 8, over the batch as verl does
      seq-mean-token-mean      1 / (S · n_b)            GRPO
      seq-mean-token-sum       1 / S
      seq-mean-token-sum-norm  1 / (S · loss_length)    Dr. GRPO
      token-mean-microbatch    (samples in the micro-batch / n) / (loss tokens in the micro-batch)

    Beside agg_loss of verl 0.9.1 (trainer/ppo/core_algos.py): the same in all four modes, but S counts no sample without
    a loss token, where verl's trainer divides by all sequences of the mini-batch. verl up to 0.7 divided
    seq-mean-token-sum-norm by the length alone: its learning rates belong to a gradient S times as large.

    A sample without loss tokens gets 0 and counts nowhere. token-mean-microbatch alone counts it as a sequence, because
    it repeats verl at 4f80e46 (workers/actor/dp_actor.py), the code of the published run; long answers in a short
    micro-batch weigh less there, so choose it only to compare.
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


def _micro_batch_weights(tokens: np.ndarray, micro_batch_ids: np.ndarray) -> np.ndarray:
    _, index, num_samples = np.unique(micro_batch_ids, return_inverse=True, return_counts=True)
    loss_tokens = np.zeros(len(num_samples), dtype=np.int64)
    np.add.at(loss_tokens, index, tokens)
    return (num_samples / len(tokens) / np.maximum(loss_tokens, 1))[index]
