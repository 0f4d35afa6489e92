"""Weight rules: for each Megatron parameter, the HF tensors it is made of and how tensor parallelism splits it. Pure data.

Change here: the rules of a new kind of layer, or a name that Megatron changed. families.py puts rules together into model
families; convert, load, export and weight sync read them through mapping.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Merge = Literal["one", "qkv", "gate_up"]
TpSplit = Literal["rows", "columns"]


@dataclass(frozen=True)
class WeightRule:
    """One Megatron parameter of the model, or of every layer, or of every expert.

    mcore     its names; {layer} and {expert} are numbers in the whole model. First the name with Megatron's local layers,
              then, if it differs, the name with Transformer Engine's fused layers
    hf        the HF tensors it is made of, in merge order
    sizes     the shape of each HF tensor, as names that WeightShape.size knows. A model in which one of the sizes is 0 does
              not have the parameter
    tp_split  the dim that tensor parallelism splits: `rows` (dim 0) or `columns` (dim 1); None if every rank holds all of it
    merge     `one`: a single HF tensor; `gate_up`: two, stacked, each split on its own; `qkv`: three, interleaved by query
              group, then split
    key       its name in a distributed checkpoint, without layer and expert numbers; "" means the last of `mcore`
    float32   True if it may be float32 in a model of a narrower dtype
    """

    mcore: tuple[str, ...]
    hf: tuple[str, ...]
    sizes: tuple[tuple[str, ...], ...]
    tp_split: TpSplit | None = None
    merge: Merge = "one"
    key: str = ""
    float32: bool = False

    @property
    def per_expert(self) -> bool:
        """Return True if every expert has one."""
        return "{expert}" in self.mcore[0]

    @property
    def per_layer(self) -> bool:
        """Return True if every layer has one."""
        return "{layer}" in self.mcore[0]

    @property
    def is_vocab(self) -> bool:
        """Return True if Megatron pads its rows to the padded vocabulary."""
        return self.sizes[0][0] == "vocab"


def _layer(
    mcore: str | tuple[str, ...],
    hf: str | tuple[str, ...],
    *sizes: tuple[str, ...],
    tp_split: TpSplit | None = None,
    merge: Merge = "one",
    key: str = "",
    float32: bool = False,
) -> WeightRule:
    """Return a rule of every layer. Adds the prefixes that all layer names share."""
    mcore = (mcore,) if isinstance(mcore, str) else mcore
    hf = (hf,) if isinstance(hf, str) else hf
    return WeightRule(
        tuple("decoder.layers.{layer}." + name for name in mcore),
        tuple("model.layers.{layer}." + name for name in hf),
        sizes,
        tp_split,
        merge,
        key and "decoder.layers." + key,
        float32,
    )


EMBEDDING = WeightRule(
    ("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), (("vocab", "hidden"),), tp_split="rows"
)
FINAL_NORM = WeightRule(("decoder.final_layernorm.weight",), ("model.norm.weight",), (("hidden",),))
OUTPUT = WeightRule(("output_layer.weight",), ("lm_head.weight",), (("vocab", "hidden"),), tp_split="rows")
TIED_OUTPUT = WeightRule(("output_layer.weight",), EMBEDDING.hf, EMBEDDING.sizes, tp_split="rows")
"""The last pipeline stage's copy of a tied embedding. No file and no checkpoint holds it."""

_QKV = tuple(f"self_attn.{letter}_proj" for letter in "qkv")
ATTENTION = (
    _layer(
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"), "input_layernorm.weight", ("hidden",)
    ),
    _layer(
        "self_attention.linear_qkv.weight",
        tuple(f"{name}.weight" for name in _QKV),
        ("query", "hidden"), ("key", "hidden"), ("key", "hidden"),
        tp_split="rows", merge="qkv",
    ),
    _layer("self_attention.linear_proj.weight", "self_attn.o_proj.weight", ("hidden", "query"), tp_split="columns"),
)  # fmt: skip
QKV_BIAS = (
    _layer(
        "self_attention.linear_qkv.bias",
        tuple(f"{name}.bias" for name in _QKV),
        ("query",), ("key",), ("key",),
        tp_split="rows", merge="qkv",
    ),
)  # fmt: skip
QK_NORM = (
    _layer("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", ("head",)),
    _layer("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", ("head",)),
)

DENSE = (
    _layer(
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"), "post_attention_layernorm.weight", ("hidden",)
    ),
    _layer(
        "mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), ("ffn", "hidden"), ("ffn", "hidden"),
        tp_split="rows", merge="gate_up",
    ),
    _layer("mlp.linear_fc2.weight", "mlp.down_proj.weight", ("hidden", "ffn"), tp_split="columns"),
)  # fmt: skip


def _expert_rules(router: str, expert: str, gate: str, up: str, down: str) -> tuple[WeightRule, ...]:
    """Return the rules of a layer with experts, for one architecture's names."""

    def fc(
        number: int, names: tuple[str, ...], *sizes: tuple[str, ...], tp_split: TpSplit, merge: Merge = "one"
    ) -> WeightRule:
        return _layer(
            (f"mlp.experts.local_experts.{{expert}}.linear_fc{number}.weight",
             f"mlp.experts.linear_fc{number}.weight{{expert}}"),
            tuple(f"{expert}.{{expert}}.{name}.weight" for name in names), *sizes,
            tp_split=tp_split, merge=merge, key=f"mlp.experts.experts.linear_fc{number}.weight",
        )  # fmt: skip

    return (
        _layer("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", ("hidden",)),
        _layer("mlp.router.weight", f"{router}.weight", ("experts", "hidden")),
        fc(1, (gate, up), ("expert_ffn", "hidden"), ("expert_ffn", "hidden"), tp_split="rows", merge="gate_up"),
        fc(2, (down,), ("hidden", "expert_ffn"), tp_split="columns"),
    )


MIXTRAL_EXPERTS = _expert_rules("block_sparse_moe.gate", "block_sparse_moe.experts", "w1", "w3", "w2")
QWEN_EXPERTS = _expert_rules("mlp.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj")


def _shared_expert_rules(name: str) -> tuple[WeightRule, ...]:
    """Return the rules of a shared expert, the one that sees every token, for one architecture's name."""
    return (
        _layer(
            "mlp.shared_experts.linear_fc1.weight", (f"mlp.{name}.gate_proj.weight", f"mlp.{name}.up_proj.weight"),
            ("shared_ffn", "hidden"), ("shared_ffn", "hidden"), tp_split="rows", merge="gate_up",
        ),
        _layer(
            "mlp.shared_experts.linear_fc2.weight", f"mlp.{name}.down_proj.weight", ("hidden", "shared_ffn"), tp_split="columns"
        ),
    )  # fmt: skip


SHARED_GATE = (_layer("mlp.shared_experts.gate_weight", "mlp.shared_expert_gate.weight", ("one", "hidden")),)

LATENT_ATTENTION = (
    _layer("input_layernorm.weight", "input_layernorm.weight", ("hidden",)),
    _layer("self_attention.linear_q_proj.weight", "self_attn.q_proj.weight", ("whole_query", "hidden"), tp_split="rows"),
    _layer("self_attention.linear_q_down_proj.weight", "self_attn.q_a_proj.weight", ("query_rank", "hidden")),
    _layer(
        ("self_attention.q_layernorm.weight", "self_attention.linear_q_up_proj.layer_norm_weight"),
        "self_attn.q_a_layernorm.weight", ("query_rank",),
    ),
    _layer(
        "self_attention.linear_q_up_proj.weight", "self_attn.q_b_proj.weight", ("query", "query_rank"), tp_split="rows"
    ),
    _layer(
        "self_attention.linear_kv_down_proj.weight", "self_attn.kv_a_proj_with_mqa.weight", ("latent_key", "hidden")
    ),
    _layer(
        ("self_attention.kv_layernorm.weight", "self_attention.linear_kv_up_proj.layer_norm_weight"),
        "self_attn.kv_a_layernorm.weight", ("key_rank",),
    ),
    _layer(
        "self_attention.linear_kv_up_proj.weight", "self_attn.kv_b_proj.weight", ("key_and_value", "key_rank"), tp_split="rows"
    ),
    _layer("self_attention.linear_proj.weight", "self_attn.o_proj.weight", ("hidden", "value"), tp_split="columns"),
)  # fmt: skip
"""DeepSeek's: keys and values come from a low-rank latent vector, and queries too unless the config has no query rank."""
EXPERT_BIAS = (_layer("mlp.router.expert_bias", "mlp.gate.e_score_correction_bias", ("experts",), float32=True),)

QWEN_SHARED_EXPERT = _shared_expert_rules("shared_expert")
DEEPSEEK_SHARED_EXPERT = _shared_expert_rules("shared_experts")
