"""Megatron-core's latent attention (MLA), with the layer that it lacks without Transformer Engine.

Change here: the layers of latent attention.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig

_CHOSEN_BY_0_19 = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")


class LatentAttention(MLASelfAttention):
    """Latent attention with exactly the layers of its specification, in every version of megatron-core.

    0.19 chooses some layers itself. If queries have no latent vector (`q_lora_rank` None), it would normalise the input of
    their projection, which DeepSeek's models do not do. Without Transformer Engine it could not be built.
    """

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """Return the specification's own layers. Overrides megatron-core 0.19; 0.16 to 0.18 never call this method."""
        return {name: getattr(submodules, name) for name in _CHOSEN_BY_0_19}


class ReplicatedLinear(torch.nn.Module):
    """A linear layer that is replicated on every tensor-parallel rank; each rank applies it to its own tokens.

    Upstream's latent attention uses Transformer Engine's layer for its down-projections. Its alternative, a column-parallel
    layer, loses other ranks' part of the gradient of the keys' rotary dims (0.16.1).
    """

    product = staticmethod(torch.nn.functional.linear)

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
        """Return (output [..., output_size], None for the bias)."""
        return self.product(hidden, self.weight), None


def use_replicated_linear() -> None:
    """Make upstream's latent attention accept ReplicatedLinear as if it were Transformer Engine's layer.

    Only for processes without Transformer Engine's layers.
    """
    multi_latent_attention.TELinear = ReplicatedLinear


LATENT_EPS = 1e-6
"""Epsilon of the latent vectors' norms. transformers and DeepSeek's own code ignore rms_norm_eps there."""


def set_latent_eps(model: torch.nn.Module) -> None:
    """Set the epsilon of all latent vectors' norms to LATENT_EPS; upstream uses rms_norm_eps.

    Transformer Engine's norms are part of the up-projections.
    """
    for attention in model.modules():
        if isinstance(attention, multi_latent_attention.MLASelfAttention):
            for name in ("q_layernorm", "kv_layernorm", "linear_q_up_proj", "linear_kv_up_proj"):
                if hasattr(norm := getattr(attention, name, None), "eps"):
                    norm.eps = LATENT_EPS
