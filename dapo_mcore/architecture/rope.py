"""Rotary position embeddings: their frequencies, computed by transformers itself.

Change here: to support a kind of RoPE scaling. With transformers' own fp32 frequencies the policy and the rollout engine
rotate queries and keys by the same angles; a difference of one ulp would grow with the position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dapo_mcore.errors import ConfigError

SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""The kinds whose frequencies do not depend on the sequence length, with the keys that each needs."""

_OPTIONAL = {"yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")}
_COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


@dataclass(frozen=True)
class Rope:
    """A rotary embedding.

    base              theta
    frequencies       float32 [head_dim / 2], radians per position for each pair of dims
    attention_factor  multiplies rotated queries and rotated keys (YaRN; otherwise 1)
    """

    base: float
    frequencies: torch.Tensor
    attention_factor: float


def read_rope(hf_config: Any) -> Rope:
    """Return the rotary embedding of a transformers config. Raises ConfigError for an unsupported kind or key."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = dict(getattr(hf_config, "rope_parameters", None) or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    _check(rope, kind)
    if kind != "default":
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](hf_config, torch.device("cpu"))
        return Rope(rope["rope_theta"], frequencies, factor)
    dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    return Rope(rope["rope_theta"], 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim), 1.0)


def _check(rope: dict[str, Any], kind: str) -> None:
    if kind not in SCALINGS:
        raise ConfigError(f"rope_type {kind!r} is not supported (here {rope}); supported are {', '.join(SCALINGS)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"partial_rotary_factor {rope['partial_rotary_factor']} is not supported; supported is 1.0")
    known = {*_COMMON, *SCALINGS[kind], *_OPTIONAL.get(kind, ())}
    for key in rope.keys() - known:
        raise ConfigError(f"rope_parameters has {key} {rope[key]!r}, which rope_type {kind!r} does not use")
    for key in ("rope_theta", *SCALINGS[kind]):
        if rope.get(key) is None:
            raise ConfigError(f"rope_parameters {rope} lacks {key}, which rope_type {kind!r} needs")
