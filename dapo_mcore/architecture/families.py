"""The table: which Megatron parameters each Hugging Face architecture has, and what they are made of.

Change here: to support an architecture, or a name that Megatron changed. It is data alone: convert, load, export and
weight sync all read it through mapping.py. What the config says beside names and sizes is architecture/reader.py's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Merge = Literal["one", "qkv", "gate_up"]
Cut = Literal["rows", "columns"]


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter, of the model or of every layer or expert.

    mcore   its names, {layer} and {expert} being global numbers: with the local spec, and where it differs, with
            Transformer Engine's fused layers
    hf      the HF tensors it is made of, in merge order
    sizes   each HF tensor's shape, in the sizes that WeightShape.size knows; a model with a size of 0 lacks the parameter
    cut     how tensor parallelism cuts it; None replicates
    merge   `one`: as it is; `gate_up`: stacked, each cut alone; `qkv`: interleaved by query group, then cut
    key     its name in a distributed checkpoint, layer and expert numbers left out; "" is the last of `mcore`
    float32 it may be float32 in a model of a narrower type
    """

    mcore: tuple[str, ...]
    hf: tuple[str, ...]
    sizes: tuple[tuple[str, ...], ...]
    cut: Cut | None = None
    merge: Merge = "one"
    key: str = ""
    float32: bool = False

    @property
    def of_expert(self) -> bool:
        return "{expert}" in self.mcore[0]

    @property
    def of_layer(self) -> bool:
        return "{layer}" in self.mcore[0]

    @property
    def is_vocab(self) -> bool:
        """Rows are padded to the padded vocabulary."""
        return self.sizes[0][0] == "vocab"


@dataclass(frozen=True)
class Family:
    """The rules of an architecture; `dense` and `moe` are those of a layer with one MLP or with experts."""

    attention: tuple[Rule, ...]
    dense: tuple[Rule, ...]
    moe: tuple[Rule, ...] = ()


def _layer(
    mcore: str | tuple[str, ...],
    hf: str | tuple[str, ...],
    *sizes: tuple[str, ...],
    cut: Cut | None = None,
    merge: Merge = "one",
    key: str = "",
    float32: bool = False,
) -> Rule:
    """A rule of every layer, the common prefixes put in front."""
    mcore = (mcore,) if isinstance(mcore, str) else mcore
    hf = (hf,) if isinstance(hf, str) else hf
    return Rule(
        tuple("decoder.layers.{layer}." + name for name in mcore),
        tuple("model.layers.{layer}." + name for name in hf),
        sizes,
        cut,
        merge,
        key and "decoder.layers." + key,
        float32,
    )


EMBEDDING = Rule(
    ("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), (("vocab", "hidden"),), cut="rows"
)
FINAL_NORM = Rule(("decoder.final_layernorm.weight",), ("model.norm.weight",), (("hidden",),))
OUTPUT = Rule(("output_layer.weight",), ("lm_head.weight",), (("vocab", "hidden"),), cut="rows")
TIED_OUTPUT = Rule(("output_layer.weight",), EMBEDDING.hf, EMBEDDING.sizes, cut="rows")
"""The last pipeline stage's copy of tied embeddings; it is in no file and no checkpoint."""

_QKV = tuple(f"self_attn.{letter}_proj" for letter in "qkv")
ATTENTION = (
    _layer(
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"), "input_layernorm.weight", ("hidden",)
    ),
    _layer(
        "self_attention.linear_qkv.weight",
        tuple(f"{name}.weight" for name in _QKV),
        ("query", "hidden"), ("key", "hidden"), ("key", "hidden"),
        cut="rows", merge="qkv",
    ),
    _layer("self_attention.linear_proj.weight", "self_attn.o_proj.weight", ("hidden", "query"), cut="columns"),
)  # fmt: skip
QKV_BIAS = (
    _layer(
        "self_attention.linear_qkv.bias",
        tuple(f"{name}.bias" for name in _QKV),
        ("query",), ("key",), ("key",),
        cut="rows", merge="qkv",
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
        cut="rows", merge="gate_up",
    ),
    _layer("mlp.linear_fc2.weight", "mlp.down_proj.weight", ("hidden", "ffn"), cut="columns"),
)  # fmt: skip


def _experts(router: str, expert: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """The rules of a layer with experts, by the names that an architecture gives them."""

    def fc(number: int, names: tuple[str, ...], *sizes: tuple[str, ...], cut: Cut, merge: Merge = "one") -> Rule:
        return _layer(
            (f"mlp.experts.local_experts.{{expert}}.linear_fc{number}.weight",
             f"mlp.experts.linear_fc{number}.weight{{expert}}"),
            tuple(f"{expert}.{{expert}}.{name}.weight" for name in names), *sizes,
            cut=cut, merge=merge, key=f"mlp.experts.experts.linear_fc{number}.weight",
        )  # fmt: skip

    return (
        _layer("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", ("hidden",)),
        _layer("mlp.router.weight", f"{router}.weight", ("experts", "hidden")),
        fc(1, (gate, up), ("expert_ffn", "hidden"), ("expert_ffn", "hidden"), cut="rows", merge="gate_up"),
        fc(2, (down,), ("hidden", "expert_ffn"), cut="columns"),
    )


MIXTRAL_EXPERTS = _experts("block_sparse_moe.gate", "block_sparse_moe.experts", "w1", "w3", "w2")
QWEN_EXPERTS = _experts("mlp.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj")


def _shared(name: str) -> tuple[Rule, ...]:
    """The rules of an expert that takes every token, by the name that an architecture gives it."""
    return (
        _layer(
            "mlp.shared_experts.linear_fc1.weight", (f"mlp.{name}.gate_proj.weight", f"mlp.{name}.up_proj.weight"),
            ("shared_ffn", "hidden"), ("shared_ffn", "hidden"), cut="rows", merge="gate_up",
        ),
        _layer(
            "mlp.shared_experts.linear_fc2.weight", f"mlp.{name}.down_proj.weight", ("hidden", "shared_ffn"), cut="columns"
        ),
    )  # fmt: skip


SHARED_GATE = (_layer("mlp.shared_experts.gate_weight", "mlp.shared_expert_gate.weight", ("one", "hidden")),)

LATENT_ATTENTION = (
    _layer("input_layernorm.weight", "input_layernorm.weight", ("hidden",)),
    _layer("self_attention.linear_q_proj.weight", "self_attn.q_proj.weight", ("whole_query", "hidden"), cut="rows"),
    _layer("self_attention.linear_q_down_proj.weight", "self_attn.q_a_proj.weight", ("query_rank", "hidden")),
    _layer(
        ("self_attention.q_layernorm.weight", "self_attention.linear_q_up_proj.layer_norm_weight"),
        "self_attn.q_a_layernorm.weight", ("query_rank",),
    ),
    _layer(
        "self_attention.linear_q_up_proj.weight", "self_attn.q_b_proj.weight", ("query", "query_rank"), cut="rows"
    ),
    _layer(
        "self_attention.linear_kv_down_proj.weight", "self_attn.kv_a_proj_with_mqa.weight", ("latent_key", "hidden")
    ),
    _layer(
        ("self_attention.kv_layernorm.weight", "self_attention.linear_kv_up_proj.layer_norm_weight"),
        "self_attn.kv_a_layernorm.weight", ("key_rank",),
    ),
    _layer(
        "self_attention.linear_kv_up_proj.weight", "self_attn.kv_b_proj.weight", ("key_and_value", "key_rank"), cut="rows"
    ),
    _layer("self_attention.linear_proj.weight", "self_attn.o_proj.weight", ("hidden", "value"), cut="columns"),
)  # fmt: skip
"""DeepSeek's: queries (through a rank, or whole) and keys with values are made from low-rank latents."""
EXPERT_BIAS = (_layer("mlp.router.expert_bias", "mlp.gate.e_score_correction_bias", ("experts",), float32=True),)

FAMILIES = {
    "Qwen2ForCausalLM": Family(ATTENTION + QKV_BIAS, DENSE),
    "Qwen3ForCausalLM": Family(ATTENTION + QK_NORM, DENSE),
    "LlamaForCausalLM": Family(ATTENTION, DENSE),
    "MistralForCausalLM": Family(ATTENTION, DENSE),
    "MixtralForCausalLM": Family(ATTENTION, (), MIXTRAL_EXPERTS),
    "Qwen2MoeForCausalLM": Family(ATTENTION + QKV_BIAS, DENSE, QWEN_EXPERTS + _shared("shared_expert") + SHARED_GATE),
    "Qwen3MoeForCausalLM": Family(ATTENTION + QK_NORM, DENSE, QWEN_EXPERTS),
    "DeepseekV3ForCausalLM": Family(LATENT_ATTENTION, DENSE, QWEN_EXPERTS + _shared("shared_experts") + EXPERT_BIAS),
}
