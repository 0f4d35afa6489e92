"""Small random models of every family, made by transformers, and what they compute in fp64.

Helpers of test_policy.py. Weights and gradients go through save_pretrained, so they carry the names that real checkpoints
have on disk. Policies are filled from a converted folder, as tools/convert.py makes it; `megatron_part` turns HF tensors
into a rank's Megatron tensors without architecture/mapping, and must give the same.
"""

from __future__ import annotations

import re
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dapo_mcore.architecture.shape import weight_shape
from dapo_mcore.convert.convert import Cut, hf_to_mcore
from dapo_mcore.convert.job import NoReport
from dapo_mcore.model_files.megatron_folder import MegatronReader
from tests.actor import parity

VOCAB = 61
LENGTHS = ((16, 24, 8, 32), (40, 40))
"""Sequences of the two micro-batches: the first is packed, the second a rectangle."""

_COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    attn_implementation="sdpa",
    initializer_range=0.08,
)
_LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=2.0, high_freq_factor=6.0)
_YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=32)
_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)

_DEEPSEEK = dict(
    num_key_value_heads=4,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=4,
    moe_intermediate_size=24,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
    q_lora_rank=48,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=12,
)
_LATENT_YARN = _YARN | dict(mscale=0.7, mscale_all_dim=1.3)

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, seven layers": ("Qwen2", {"num_hidden_layers": 7, "tie_word_embeddings": True}),
    "qwen2, yarn": ("Qwen2", {"rope_parameters": _YARN}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "llama": ("Llama", {"rope_parameters": _LLAMA3 | {"original_max_position_embeddings": 32}}),
    "llama, linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama, one key-value head": ("Llama", {"num_key_value_heads": 1}),
    "llama, eight heads": ("Llama", {"num_attention_heads": 8}),
    "mistral": ("Mistral", {"head_dim": 24, "sliding_window": None}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": ("Qwen2Moe", _EXPERTS | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [1]}),
    "qwen3-moe": ("Qwen3Moe", _EXPERTS | {"head_dim": 32, "norm_topk_prob": True, "mlp_only_layers": []}),
    "qwen3-moe, sparse": ("Qwen3Moe", _EXPERTS | {"head_dim": 32, "decoder_sparse_step": 2, "num_experts_per_tok": 1}),
    "deepseek-v3": ("DeepseekV3", _DEEPSEEK | {"rope_parameters": _LATENT_YARN}),
    "deepseek-v3, no groups": ("DeepseekV3", _DEEPSEEK | {"q_lora_rank": None, "n_group": 1, "topk_group": 1}),
}


def hf_config(name: str, **changes: Any) -> Any:
    import transformers

    kind, own = FAMILIES[name]
    return getattr(transformers, f"{kind}Config")(**_COMMON | own | changes, architectures=[f"{kind}ForCausalLM"])


@dataclass(frozen=True)
class Problem:
    """A model with its solution. Tensors are HF-named, as on disk.

    converted   folder with the weights as a Megatron checkpoint
    weights     fp32
    tokens      int64, one tensor [b·s] a micro-batch; targets and loss_weights likewise
    logits      fp64 [b·s, V] a micro-batch
    gradients   fp64, of Σ loss_weights · -log p(target)
    errors      transformers' own fp32 error against `logits`: (largest |Δ|, ‖Δ‖₂)
    """

    hf_config: Any
    converted: Path
    weights: dict[str, torch.Tensor]
    tokens: list[torch.Tensor]
    targets: list[torch.Tensor]
    loss_weights: list[torch.Tensor]
    logits: list[torch.Tensor]
    gradients: dict[str, torch.Tensor]
    errors: tuple[float, float]


def save_problem(name: str, folder: Path, **changes: Any) -> Path:
    """Write a file that `load_problem` reads; transformers solves the problem in fp64."""
    from transformers import AutoModelForCausalLM

    config = hf_config(name, **changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").float()
    _condition(model)
    weights = _as_on_disk(model, folder / "weights")
    # sharded for another layout than that of most tests
    hf_to_mcore(folder / "weights", folder / "mcore", Cut(tensor_parallel=2), NoReport())
    noise = torch.Generator().manual_seed(2)
    sizes = [sum(lengths) for lengths in LENGTHS]
    tokens = [torch.randint(5, 11, (n,), generator=noise) for n in sizes]
    targets = [torch.randint(5, 9, (n,), generator=noise) for n in sizes]
    loss_weights = [(0.5 + torch.rand(n, generator=noise)) / sum(sizes) for n in sizes]
    rough = _logits(model, tokens)
    model = model.double()
    compute_in_fp64(model)
    logits = _logits(model, tokens)
    loss = sum(
        -(z.log_softmax(-1).gather(1, t[:, None])[:, 0] * w).sum() for z, t, w in zip(logits, targets, loss_weights)
    )
    loss.backward()
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.zero_()  # it has no gradient
    delta = (torch.cat(rough) - torch.cat(logits)).detach()
    problem = Problem(
        config,
        folder / "mcore",
        weights,
        tokens,
        targets,
        loss_weights,
        [z.detach() for z in logits],
        _as_on_disk(model, folder / "gradients"),
        (float(delta.abs().max()), float(delta.norm())),
    )
    path = folder / "problem.pt"
    torch.save(problem, path)
    return path


def load_problem(path: str) -> Problem:
    return torch.load(path, weights_only=False)  # this test has written the file itself


def _condition(model: torch.nn.Module) -> None:
    """Condition the weights as parity.start_weights does: biases and norms away from 0 and 1, attention far from uniform.

    Routers are sharper than at initialisation, so no choice of experts is near a tie.
    """
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=noise))
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(2.0)
            if name.endswith("mlp.gate.weight"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=noise))
            if "q_a_proj" in name or "q_b_proj" in name or "kv_a_proj" in name:
                parameter.mul_(2.0)
            if "embed_tokens" in name:
                parameter.mul_(20.0)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=noise))
        if model.config.tie_word_embeddings:
            model.model.norm.weight.mul_(0.05)  # the large embedding would make the logits extreme


def _logits(model: torch.nn.Module, tokens: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the logits, computed sequence by sequence."""
    return [
        torch.cat([model(sequence[None]).logits[0] for sequence in batch.split(lengths)])
        for batch, lengths in zip(tokens, LENGTHS)
    ]


def _as_on_disk(model: torch.nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def compute_in_fp64(model: torch.nn.Module) -> None:
    """Make RMSNorm and routing compute in fp64. transformers uses fp32, which is not exact enough for a reference."""
    parity.norms_in_fp64(model)
    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.forward = types.MethodType(_route, module)
        if type(module).__name__ == "DeepseekV3TopkRouter":
            # in transformers 5.12 the layer around the router chooses the experts, in the logits' dtype
            chooses = hasattr(module, "num_group")
            module.forward = types.MethodType(_route_deepseek if chooses else _router_logits, module)


def _route(self: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = hidden.reshape(-1, self.weight.size(1)) @ self.weight.T
    chosen, indices = logits.softmax(-1).topk(self.top_k)
    if getattr(self, "norm_topk_prob", True):
        chosen = chosen / chosen.sum(-1, keepdim=True)
    return logits, chosen, indices


def _router_logits(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    return hidden.reshape(-1, self.weight.size(1)) @ self.weight.T


def _route_deepseek(self: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose among the experts of each token's best groups. The bias decides which are chosen, but not their weights."""
    logits = _router_logits(self, hidden)
    scores = logits.sigmoid()
    ranked = (scores + self.e_score_correction_bias).unflatten(-1, (self.num_group, -1))
    groups = ranked.topk(2)[0].sum(-1)
    kept = groups >= groups.topk(self.topk_group)[0][:, -1:]
    indices = ranked.masked_fill(~kept[..., None], -torch.inf).flatten(1).topk(self.top_k)[1]
    chosen = scores.gather(1, indices)
    return logits, self.routed_scaling_factor * chosen / chosen.sum(-1, keepdim=True), indices


def megatron_part(name: str, disk: dict[str, torch.Tensor], hf: Any, layout: Any) -> torch.Tensor:
    """Return this rank's part of a Megatron parameter (global name), cut from whole HF tensors."""
    layer = re.match(r"decoder\.layers\.(\d+)\.", name)
    prefix = f"model.layers.{layer[1]}." if layer else ""
    rest = name[layer.end() :] if layer else name
    rank, size = layout.tensor_rank, layout.tensor
    if expert := re.match(r"mlp\.experts\.local_experts\.(\d+)\.", rest):
        rank, size = layout.expert_tensor_rank, layout.expert_tensor
    mlp = _mlp_prefix(prefix, expert, "shared_experts" in rest, disk)
    gate, up, down = ("w1", "w3", "w2") if "block_sparse_moe" in mlp else ("gate_proj", "up_proj", "down_proj")

    def rows(*tensors: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor.chunk(size)[rank] for tensor in tensors])

    if rest in ("embedding.word_embeddings.weight", "output_layer.weight"):
        source = (
            "model.embed_tokens.weight" if "embedding" in rest or "lm_head.weight" not in disk else "lm_head.weight"
        )
        unit = 8 * size
        return rows(torch.nn.functional.pad(disk[source], (0, 0, 0, -disk[source].size(0) % unit)))
    if rest.endswith("linear_fc1.weight"):
        return rows(disk[f"{mlp}{gate}.weight"], disk[f"{mlp}{up}.weight"])
    if rest.endswith("linear_fc2.weight"):
        return disk[f"{mlp}{down}.weight"].chunk(size, dim=1)[rank]
    if latent := re.fullmatch(r"self_attention\.linear_(q|kv)_(proj|up_proj|down_proj)\.weight", rest):
        source = f"{prefix}self_attn.{_LATENT[latent[1], latent[2]]}.weight"
        return disk[source] if latent[2] == "down_proj" else rows(disk[source])
    if "linear_qkv" in rest:
        kind = rest.rpartition(".")[2]
        groups = hf.num_key_value_heads
        qkv = [disk[f"{prefix}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
        return rows(torch.cat([part for group in zip(*(x.chunk(groups) for x in qkv)) for part in group]))
    if rest.endswith("linear_proj.weight"):
        return disk[f"{prefix}self_attn.o_proj.weight"].chunk(size, dim=1)[rank]
    if rest == "self_attention.q_layernorm.weight" and f"{prefix}self_attn.q_a_layernorm.weight" in disk:
        return disk[f"{prefix}self_attn.q_a_layernorm.weight"]
    return disk[prefix + _WHOLE[rest].format(mlp="block_sparse_moe" if "block_sparse_moe" in mlp else "mlp")]


def fill(policy: Any, problem: Problem, layout: Any) -> None:
    """Load the problem's weights from the converted folder into a Policy."""
    shape = weight_shape(problem.hf_config, layout.tensor)
    policy.load_weights(MegatronReader(problem.converted, shape), shape, layout)
    for name, tensor in policy.named_weights():
        expected = megatron_part(name, problem.weights, problem.hf_config, layout)
        assert torch.equal(tensor, expected.to(tensor.dtype)), name


_LATENT = {
    ("q", "proj"): "q_proj",
    ("q", "down_proj"): "q_a_proj",
    ("q", "up_proj"): "q_b_proj",
    ("kv", "down_proj"): "kv_a_proj_with_mqa",
    ("kv", "up_proj"): "kv_b_proj",
}

_WHOLE = {
    "self_attention.kv_layernorm.weight": "self_attn.kv_a_layernorm.weight",
    "mlp.router.expert_bias": "mlp.gate.e_score_correction_bias",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "mlp.router.weight": "{mlp}.gate.weight",
    "mlp.shared_experts.gate_weight": "mlp.shared_expert_gate.weight",
}


def _mlp_prefix(layer: str, expert: re.Match[str] | None, shared: bool, disk: dict[str, torch.Tensor]) -> str:
    mlp = "block_sparse_moe" if f"{layer}block_sparse_moe.gate.weight" in disk else "mlp"
    if expert:
        return f"{layer}{mlp}.experts.{expert[1]}."
    if shared:
        return (
            f"{layer}{mlp}.shared_experts."
            if f"{layer}mlp.shared_experts.up_proj.weight" in disk
            else f"{layer}{mlp}.shared_expert."
        )
    return f"{layer}{mlp}."
