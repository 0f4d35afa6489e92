"""The defaults of slime that the table reads, as of commit 624b824 (2026-08-21), and Megatron's where slime leaves them.

Change here: a default of slime, with the version it is from. Source: slime/utils/arguments.py; and of the Megatron-LM that slime pins
(docker/Dockerfile: 1dcf0da, 2026-02-14) training/arguments.py, training/training_config.py and core/transformer/transformer_config.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dapo_mcore.foreign.settings import ForeignRun

_DEFAULTS: Mapping[str, Any] = {
    "rollout-seed": 42,
    "input-key": "input",
    "apply-chat-template": False,
    "rollout-shuffle": False,
    "n-samples-per-prompt": 1,
    "rollout-temperature": 1.0,
    "rollout-top-p": 1.0,
    "rollout-top-k": -1,
    "rollout-num-gpus-per-engine": 1,
    "actor-num-nodes": 1,
    "actor-num-gpus-per-node": 8,
    "num-gpus-per-node": 8,
    "micro-batch-size": 1,
    "advantage-estimator": "grpo",
    "eps-clip": 0.2,
    "value-clip": 0.2,
    "kl-coef": 0.0,
    "kl-loss-coef": 0.0,
    "kl-loss-type": "k1",
    "entropy-coef": 0.0,
    "gamma": 1.0,
    "lambd": 1.0,
    "tis-clip": 2.0,
    "tis-clip-low": 0,
    "num-critic-only-steps": 0,
    "optimizer": "adam",
    "attention-dropout": 0.1,
    "hidden-dropout": 0.1,
    "lr": 1e-6,
    "lr-decay-style": "linear",
    "lr-warmup-iters": 0,
    "min-lr": 0.0,
    "weight-decay": 0.01,
    "adam-beta1": 0.9,
    "adam-beta2": 0.999,
    "clip-grad": 1.0,
    "tensor-model-parallel-size": 1,
    "pipeline-model-parallel-size": 1,
    "context-parallel-size": 1,
    "expert-model-parallel-size": 1,
    "n-samples-per-eval-prompt": 1,
    "loss-type": "policy_loss",
    "moe-router-bias-update-rate": 1e-3,
}


def slime_defaults(run: ForeignRun) -> Mapping[str, Any]:
    """Return the defaults of a run; they are the same for all."""
    return _DEFAULTS
