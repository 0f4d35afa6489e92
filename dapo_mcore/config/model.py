"""The section `model`: the policy, its precision, and what its backward pass recomputes.

Change here: what a user may set about the model, its default, and a rule inside the section. Which modules of a list fit a
model is in actor/model/recompute.py, what an FP8 recipe asks for in actor/model/fp8_rules.py.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from dapo_mcore.config.values import FilePath, Section, Text

RecomputeLevel = Literal["none", "selective", "full"]
RecomputeModule = Literal["core_attn", "mlp", "layernorm", "mla_up_proj", "moe", "moe_act", "shared_experts"]
"""A part of a layer, as megatron-core names it."""


class Fp8Config(Section):
    """FP8 for the products of the policy's linear layers. Weights, optimizer, head, attention and norms stay as they are.

    On a GPU Transformer Engine computes it, with model.dtype bf16. The inputs that the backward pass keeps then take one byte
    per number instead of two, and two FP8 copies of each weight add two bytes. On a CPU it is simulated with the same codes
    and scales, to see what it does to a run. Scoring uses the same products as training. Transformer Engine's variables hold
    for both, and must be alike on all ranks: NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1 gives `blockwise` fp32 scales in place of
    powers of two, NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES=1 gives `tensorwise` powers of two.
    """

    recipe: Literal["auto", "blockwise", "tensorwise", "mxfp8", "delayed"] = "auto"
    """`blockwise`: a scale per 128 values of a token, and per 128 × 128 weights. `tensorwise`: one scale per matrix, so all
    sequences of a pack share it; the fastest on Hopper. `mxfp8`: a scale per 32 values, on Blackwell. `auto` takes mxfp8 on
    Blackwell (compute capability 10.x), else blockwise; the training ranks choose, and must agree. `delayed` is refused: its
    scales start at 1, where the first gradients underflow."""
    format: Literal["e4m3", "hybrid"] | None = None
    """`hybrid` has e5m2 for gradients. None: hybrid for tensorwise, else e4m3."""
    first_last_bf16: int = Field(0, ge=0)
    """Number of layers at each end of the model that stay in bf16."""

    @model_validator(mode="after")
    def _check_recipe(self) -> Fp8Config:
        if self.recipe == "delayed":
            raise ValueError(
                "recipe delayed takes scales from earlier steps and starts without any, so DAPO's first gradients, which are "
                "divided by the number of tokens, underflow; use blockwise or tensorwise"
            )
        if self.recipe == "mxfp8" and self.format == "hybrid":
            raise ValueError("recipe mxfp8 with format hybrid is known to diverge; use format e4m3")
        return self


class ModelConfig(Section):
    """The policy: a Hugging Face folder, and how Megatron builds it."""

    path: FilePath
    """Folder with config.json, tokenizer files and (for init=pretrained) safetensors; or the name of a model on the Hugging Face
    hub, such as Qwen/Qwen2.5-7B (hf://Qwen/Qwen2.5-7B where a folder Qwen exists). One rank of each node asks the hub and downloads
    the model into its cache, safetensors only; with HF_HUB_OFFLINE=1 it is taken from there."""
    revision: Text | None = None
    """Branch, tag or commit of a model on the hub. None: main. With a commit, all nodes and later runs have the same weights."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` draws weights from `seed` with the config's initializer_range: for tests and for the quickstart."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Keys of config.json to replace, for actor, servers, plan and exports: {max_position_embeddings: 32768}, or a rope_scaling.
    With init=pretrained none may change the size of a weight. Servers at rollout.sglang.urls must be started with the same keys."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of weights and activations in training; fp32 masters and Adam moments as the section `optimizer` says."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """`auto` takes Transformer Engine where it is installed and a GPU is present, else the local layers."""
    fp8: Fp8Config | None = None
    recompute: RecomputeLevel | list[RecomputeModule] = "none"
    """What the backward pass computes again instead of keeping it from the forward pass. Gradients stay the same. `full` keeps
    the input of each layer and nothing else, for one more forward pass of all layers (28 % of a step of a 1.5B model on an
    H100). A list names parts of a layer; `selective` is [core_attn]. Bytes saved per token and layer in bf16, and FLOPs added:

    core_attn        padded copies of q, k and v in local layers; nothing with fused attention; its forward pass
    mlp              6 · intermediate_size; a third of what the dense MLP costs without it: 6 · hidden_size · intermediate_size
    layernorm        2 · hidden_size per norm that is not fused into a product, next to no FLOPs
    mla_up_proj      q, k and v of latent attention, 2 · heads · (2 · qk_head_dim + v_head_dim), in local layers only beside
                     core_attn; their up-projections (megatron-core 0.19 compiles a C++ function for it)
    moe              all that a layer with experts keeps except its input; its forward pass, communication included
    moe_act          2 · experts per token · moe_intermediate_size; next to no FLOPs
    shared_experts   like mlp, for the shared experts' width

    layernorm and moe_act need Transformer Engine's layers."""
    moe_aux_loss_coef: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Coefficient of the experts' load-balancing loss; 0 for none. Each layer with experts adds, for the mean sample, the loss
    of actor/model/routing.py, which is 1 for equal loads. It costs a softmax per router and one small all-reduce over the tensor-
    and context-parallel ranks."""
    routing_replay: Literal["none", "scoring"] = "none"
    """`scoring`: every gradient step routes a token to the experts that the scoring pass chose, so that only weights move the
    ratio. The step that needs no scoring pass has the same weights, and routes of its own. Holds one byte (two beyond 256 experts)
    per token, layer with experts and expert chosen in host memory until the rollout step ends: 7.7 MB for 20,000 tokens, 48
    layers and 8 experts."""
    offload_activations: bool = False
    """With recompute full, keep the inputs of the layers in pinned host memory from the forward to the backward pass, for long
    sequences. Two layers' inputs stay on the GPU. In bf16 this saves 2 · hidden_size bytes per token and further layer (divided
    by tensor_parallel with sequence_parallel), and takes up to twice as much host memory on each rank. The same bytes cross the
    bus in each pass, beside the computation. At F FLOP/s and P parameters per layer they are hidden if the bus carries
    hidden_size · F / P bytes per second: at 500 TFLOP/s 5 GB/s for Qwen2.5-32B, 16 GB/s for 1.5B (tensor_parallel times as
    much without sequence_parallel). Gradients stay the same."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model or tokenizer. Only for code that you have read."""

    @model_validator(mode="after")
    def _check_offload(self) -> ModelConfig:
        if self.offload_activations and self.recompute != "full":
            raise ValueError(
                "offload_activations moves the inputs of layers, which are all that recompute full keeps, but recompute is "
                f"{self.recompute}: a layer would keep much more on the GPU; set recompute full, or offload_activations false"
            )
        return self

    @field_validator("recompute", mode="before")
    @classmethod
    def _check_recompute(cls, value: Any) -> Any:
        """Say in one line what a level or a list may be, where pydantic would report both alternatives."""
        levels, modules = get_args(RecomputeLevel), get_args(RecomputeModule)
        if not isinstance(value, list):
            if value in levels:
                return value
            raise ValueError(f"use {', '.join(levels)}, or a list of {', '.join(modules)}")
        if not value or len(set(map(str, value))) < len(value) or not {*map(str, value)} <= {*modules}:
            raise ValueError(f"a list has one or more of {', '.join(modules)}, each once; none recomputes nothing")
        inside = [module for module in value if module in ("moe_act", "shared_experts")]
        if "moe" in value and inside:
            raise ValueError(f"moe recomputes {' and '.join(inside)} with the whole layer; leave out one or the other")
        return value
