"""RMSNorm with sequence parallelism, where Transformer Engine is absent."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension.

    Upstream's WrappedTorchNorm (megatron-core 0.16.1, transformer/torch_norm.py) refuses sequence parallelism. The norm
    itself is local to a token; what is needed is the mark `weight.sequence_parallel`, by which finalize_model_grads
    sums the weight's gradient over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Same shape and dtype as `hidden` [..., H]."""
        return functional.rms_norm(hidden, (hidden.size(-1),), self.weight, self.eps)
