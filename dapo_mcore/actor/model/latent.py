"""Megatron-core's latent attention, with what it lacks without Transformer Engine.

Change here: which layers latent attention is made of.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig

_CHOSEN = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")


class LatentAttention(MLASelfAttention):
    """Latent attention with exactly the layers of its specification, in every version of megatron-core.

    0.19 chooses some itself: where queries have no latent vector (`q_lora_rank` None) it would normalise what goes into
    their projection, which DeepSeek's models do not, or without Transformer Engine refuse to be built.
    """

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """Overrides megatron-core 0.19; 0.16 to 0.18 take the specification as it is, and do not call this."""
        return {name: getattr(submodules, name) for name in _CHOSEN}


class WholeLinear(torch.nn.Module):
    """A linear layer that every tensor-parallel rank holds whole and applies to its own tokens.

    Upstream's latent attention takes Transformer Engine's for its down-projections. Its other choice, a column-parallel
    layer, loses the other ranks' share of the gradient of the keys' rotary part (0.16.1).
    """

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, init_method: Any, bias: bool, **_: Any
    ):
        super().__init__()
        assert not bias
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype, device=device))
        init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel  # sums its gradient over the tensor-parallel group

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        """([…, output_size], no bias)."""
        return torch.nn.functional.linear(hidden, self.weight), None


def use_whole_linear() -> None:
    """Makes upstream's latent attention accept WholeLinear where it knows only Transformer Engine's layer; for processes
    whose layers are not Transformer Engine's."""
    multi_latent_attention.TELinear = WholeLinear


LATENT_EPS = 1e-6
"""Of the norms of the latents, whatever rms_norm_eps is: transformers' and DeepSeek's own code leave it at the default."""


def set_latent_eps(model: torch.nn.Module) -> None:
    """Give the norms of all latents LATENT_EPS, where upstream has the config's; Transformer Engine's are part of the
    up-projections."""
    for attention in model.modules():
        if isinstance(attention, multi_latent_attention.MLASelfAttention):
            for name in ("q_layernorm", "kv_layernorm", "linear_q_up_proj", "linear_kv_up_proj"):
                if hasattr(norm := getattr(attention, name, None), "eps"):
                    norm.eps = LATENT_EPS
