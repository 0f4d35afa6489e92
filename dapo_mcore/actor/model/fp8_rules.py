"""What an FP8 recipe requires of the GPU, the model's widths and a pack's length, and which Megatron fields it sets.

Change here: a recipe's default, its rules, or a new recipe. This module does not import Megatron, so a run can be checked
before it starts.
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from typing import Any

import torch

from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.architecture.reader import Architecture
from dapo_mcore.config.model import Fp8Config, ModelConfig
from dapo_mcore.config.parallel import ParallelConfig
from dapo_mcore.errors import ConfigError, listed

_ANY = (99, 0)
_NEEDS = {
    "tensorwise": ((8, 9), _ANY, (2, 2), (12, 1)),
    "blockwise": ((9, 0), _ANY, (2, 3), (12, 9)),
    "mxfp8": ((10, 0), (12, 0), (2, 1), (0, 0)),
}
"""Per recipe: the lowest compute capability and the first one that lacks it, the oldest Transformer Engine that megatron-core
accepts, and the oldest CUDA. Transformer Engine 2.11 checks cards and CUDA with an assertion in the first forward pass."""

FP32_SCALES = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"
POWER_2_SCALES = "NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES"
"""Transformer Engine's own variables: 1 gives `blockwise` fp32 scales, and `tensorwise` powers of two."""

_ONE_RANK = {"tensor_parallel": 1, "expert_tensor_parallel": 1}


def recipe_of(fp8: Fp8Config) -> str:
    """Return the recipe; `auto` is mxfp8 where this process has a card for it (Blackwell, except 12.x), else blockwise."""
    if fp8.recipe != "auto":
        return fp8.recipe
    return "mxfp8" if torch.cuda.is_available() and _fits("mxfp8") else "blockwise"


def format_of(fp8: Fp8Config) -> str:
    """Return the format, whose default is e4m3, or hybrid for tensorwise as in Transformer Engine."""
    return fp8.format or ("hybrid" if recipe_of(fp8) == "tensorwise" else "e4m3")


def has_power_of_two_scales(recipe: str) -> bool:
    """Return True if a recipe's scales are powers of two, as this process' environment says."""
    if recipe == "tensorwise":
        return os.environ.get(POWER_2_SCALES) == "1"
    return recipe == "mxfp8" or os.environ.get(FP32_SCALES) != "1"


def token_multiple(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Return the number that must divide a pack's tokens on one context-parallel rank.

    Sequence parallelism splits these tokens over the tensor-parallel ranks; each product wants a multiple of its tile.
    """
    ranks = parallel.tensor_parallel if parallel.sequence_parallel else 1
    return ranks * (_tokens_per_rank(recipe_of(model.fp8), parallel.sequence_parallel) if model.fp8 else 1)


def bf16_layers(fp8: Fp8Config, num_layers: int) -> frozenset[int]:
    """Return the indices of the layers that stay in bf16: `first_last_bf16` at each end."""
    ends = fp8.first_last_bf16
    return frozenset([*range(ends), *range(num_layers - ends, num_layers)])


def megatron_fields(fp8: Fp8Config, num_experts: int) -> dict[str, Any]:
    """Return the fields of Megatron's TransformerConfig that make Transformer Engine's layers use FP8."""
    fields: dict[str, Any] = dict(fp8=format_of(fp8), fp8_recipe=recipe_of(fp8))
    if ends := fp8.first_last_bf16:
        fields |= dict(first_last_layers_bf16=True, num_layers_at_start_in_bf16=ends, num_layers_at_end_in_bf16=ends)
    return fields | (dict(moe_router_padding_for_quantization=True) if num_experts else {})


def check_fp8(architecture: Architecture, model: ModelConfig, parallel: ParallelConfig, *, engine: bool) -> None:
    """Raise ConfigError if the model, the card or Transformer Engine does not support `model.fp8`.

    engine  True if the layers are Transformer Engine's.
    """
    if model.fp8 is not None:
        _check_device(recipe_of(model.fp8), model.dtype, engine)
        check_fp8_model(architecture, model, parallel)


def check_fp8_model(architecture: Architecture, model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raise ConfigError if no card could run the model's layers with `model.fp8`."""
    fp8 = model.fp8
    if fp8 is None:
        return
    recipe = recipe_of(fp8)
    if 2 * fp8.first_last_bf16 >= architecture.num_layers:
        raise ConfigError(
            f"model.fp8.first_last_bf16 {fp8.first_last_bf16} keeps {2 * fp8.first_last_bf16} layers in bf16, but the model "
            f"has {architecture.num_layers}, so no product would be in FP8; set it to at most {(architecture.num_layers - 1) // 2}"
        )
    multiple, whole = 32 if recipe == "mxfp8" else 16, parallel.model_copy(update=_ONE_RANK)
    usable = _widths(architecture.fields, whole)
    for name, width in _widths(architecture.fields, parallel).items():
        if width % multiple:
            remedy = (
                "lower parallel.tensor_parallel"
                if usable[name] % multiple == 0
                else "set model.fp8 null for this model"
            )
            raise ConfigError(
                f"model.fp8.recipe {recipe} needs widths divisible by {multiple}, but {name} is {width} per rank "
                f"(tensor_parallel {parallel.tensor_parallel}); {remedy}"
            )


def check_same_on_all_ranks(fp8: Fp8Config, layout: Layout) -> None:
    """Raise ConfigError, on every rank, if cards or environments would make ranks quantize differently.

    Collectives: a gather and a broadcast over the control group.
    """
    found: list[Any] = layout.gather_objects((_how(fp8), _card()))
    layout.on_controller_or_raise(lambda: _check_same(found))


def describe_fp8(model: ModelConfig) -> str:
    """Return one line about the FP8 of a run, as this process resolves it."""
    fp8 = model.fp8
    assert fp8 is not None
    on_gpu = torch.cuda.is_available()
    chosen = (
        "" if fp8.recipe != "auto" else " (auto)" if on_gpu else " (auto; mxfp8 if the training GPUs are Blackwell)"
    )
    where = (
        f"by Transformer Engine on {_card()}"
        if on_gpu
        else f"simulated on the CPU with {model.dtype} values{'' if model.dtype == 'bf16' else ' (a GPU needs model.dtype bf16)'}"
    )
    return f"FP8: recipe {_how(fp8)}{chosen}, format {format_of(fp8)}, {where}"


def _how(fp8: Fp8Config) -> str:
    recipe = recipe_of(fp8)
    unusual = {("blockwise", False): " with fp32 scales", ("tensorwise", True): " with power-of-two scales"}
    return recipe + unusual.get((recipe, has_power_of_two_scales(recipe)), "")


def _card() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def _check_same(found: list[tuple[str, str]]) -> None:
    """Raise ConfigError if the (recipe, card) of the ranks, in rank order, have different recipes."""
    if len({how for how, _ in found}) < 2:
        return
    alike = [
        (how, card, [rank for rank, _ in part])
        for (how, card), part in groupby(enumerate(found), lambda entry: entry[1])
    ]
    parts = [
        f"{how} on rank{f's {ranks[0]} to {ranks[-1]}' if ranks[1:] else f' {ranks[0]}'} ({card})"
        for how, card, ranks in alike
    ]
    raise ConfigError(
        f"model.fp8: ranks would quantize differently: {'; '.join(parts)}; name one model.fp8.recipe that all cards have, and "
        f"set {FP32_SCALES} and {POWER_2_SCALES} alike on all nodes"
    )


def _tokens_per_rank(recipe: str, sequence_parallel: bool) -> int:
    if recipe == "blockwise":
        return 128 if sequence_parallel else 16  # the gather must not cut a tile of 128 tokens
    return 32 if recipe == "mxfp8" else 16


def _check_device(recipe: str, dtype: str, engine: bool) -> None:
    if not torch.cuda.is_available():
        return  # simulated
    if dtype != "bf16":
        raise ConfigError(
            f"model.fp8 on a GPU needs model.dtype bf16, but it is {dtype}: Transformer Engine's flash and fused attention refuse "
            f"{dtype}, and its unfused one keeps scores for every pair of tokens; set model.dtype bf16"
        )
    if not engine:
        raise ConfigError(
            "model.fp8 on a GPU needs Transformer Engine's layers, but this run has local ones; install the extra `te`, and "
            "leave model.transformer_impl at auto"
        )
    lowest, end, release, cuda = _NEEDS[recipe]
    if not _fits(recipe):
        possible = [name for name in _NEEDS if _fits(name)]
        raise ConfigError(
            f"model.fp8.recipe {recipe} needs a GPU of compute capability {_dotted(lowest)} or higher"
            f"{'' if end == _ANY else f', below {_dotted(end)}'}; "
            f"{torch.cuda.get_device_name()} has {_dotted(torch.cuda.get_device_capability())}; "
            f"set model.fp8{f'.recipe {listed(possible)}' if possible else ' null'}"
        )
    for name, installed, oldest in (
        ("transformer-engine", _engine_version(), release),
        ("CUDA", _numbers(torch.version.cuda or _dotted(_ANY)), cuda),
    ):
        if installed < oldest:
            raise ConfigError(
                f"model.fp8.recipe {recipe} needs {name} {_dotted(oldest)} or newer; {_dotted(installed)} is installed: update it"
            )


def _fits(recipe: str) -> bool:
    """Return True if this process' card has the recipe."""
    lowest, end, *_ = _NEEDS[recipe]
    return lowest <= torch.cuda.get_device_capability() < end


def _engine_version() -> tuple[int, ...]:
    for name in ("transformer-engine", "transformer_engine_torch"):
        try:
            return _numbers(version(name))
        except PackageNotFoundError:
            continue
    return (0, 0)


def _widths(fields: dict[str, Any], parallel: ParallelConfig) -> dict[str, int]:
    """Return the widths of all linear layers' inputs and outputs on one rank, by name."""
    tensor, heads = parallel.tensor_parallel, fields["num_attention_heads"]
    widths = {"hidden_size": fields["hidden_size"]} | _attention_widths(fields, heads, tensor)
    if "num_moe_experts" not in fields or fields["moe_layer_freq"] != 1:
        widths["intermediate_size"] = fields["ffn_hidden_size"] // tensor
    if "num_moe_experts" in fields:
        widths["the experts' intermediate size"] = fields["moe_ffn_hidden_size"] // parallel.expert_tensor_size
    if shared := fields.get("moe_shared_expert_intermediate_size"):
        widths["the shared experts' intermediate size"] = shared // tensor
    return widths


def _attention_widths(fields: dict[str, Any], heads: int, tensor: int) -> dict[str, int]:
    if not fields.get("multi_latent_attention"):
        size = fields["kv_channels"]
        rows = (heads + 2 * fields["num_query_groups"]) * size
        return {
            "the output of the q, k and v projection": rows // tensor,
            "num_attention_heads * head_dim": heads * size // tensor,
        }
    plain, rotary, value = fields["qk_head_dim"], fields["qk_pos_emb_head_dim"], fields["v_head_dim"]
    latent, queries = fields["kv_lora_rank"], fields.get("q_lora_rank")
    return {
        "the width of q": heads * (plain + rotary) // tensor,
        "the width of k and v": heads * (plain + value) // tensor,
        "the width of the heads": heads * value // tensor,
        "kv_lora_rank + qk_rope_head_dim": latent + rotary,
        "kv_lora_rank": latent,
        **({"q_lora_rank": queries} if queries else {}),
    }


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".")[:2])


def _dotted(parts: tuple[int, ...]) -> str:
    return ".".join(map(str, parts))
