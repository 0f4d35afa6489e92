"""The weight stream in the form that SGLang loads: heads of tied models, and FP8 codes with their scales and names."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from dapo_mcore.kernels.fp8_quant import dequantize_blocks
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from dapo_mcore.architecture.families import FAMILIES
from dapo_mcore.architecture.manifest import WeightManifest
from dapo_mcore.config.sglang import SGLangConfig
from dapo_mcore.errors import ConfigError
from dapo_mcore.model_files.safetensors_file import SafetensorsFile
from dapo_mcore.rollout.sglang import server_side
from dapo_mcore.rollout.sglang.engine import SGLangEngine
from dapo_mcore.rollout.sglang.launch.servers import ServerPlan, quantization_config
from dapo_mcore.rollout.sglang.sync.delta import Packing, encode
from dapo_mcore.rollout.sglang.sync.weight_format import check_architecture, quantized, with_cache_scales, with_heads
from tests.rollout.sglang.fake_server import fake_python
from tests.rollout.sglang.serving import (
    CONTEXT,
    STOP,
    VOCAB,
    engine,
    real_python,
    servers,
    settings,
    tiny_config,
    told,
    weights,
)

SERVER_SIDE = Path(server_side.__file__).parent
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = {HEAD: EMBEDDING}


@pytest.mark.parametrize(
    ("architecture", "tied", "expected"),
    [
        ("Qwen3MoeForCausalLM", TIED, [(EMBEDDING, 0), (HEAD, 0), ("model.norm.weight", 2)]),
        ("Qwen3MoeForCausalLM", {}, [(EMBEDDING, 0), (HEAD, 1), ("model.norm.weight", 2)]),
        ("Qwen3ForCausalLM", TIED, [(EMBEDDING, 0), (HEAD, 1), ("model.norm.weight", 2)]),
    ],
)
def test_a_tied_head_follows_the_embedding_if_sglang_keeps_both(architecture, tied, expected):
    stream = [(EMBEDDING, torch.tensor([0])), (HEAD, torch.tensor([1])), ("model.norm.weight", torch.tensor([2]))]
    assert [(name, tensor.item()) for name, tensor in with_heads(iter(stream), architecture, tied)] == expected


def test_servers_of_a_tied_moe_model_get_a_head(tmp_path):
    sizes = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    more = dict(num_key_value_heads=1, max_position_embeddings=CONTEXT, num_experts=2, moe_intermediate_size=48)
    config = Qwen3MoeConfig(**sizes, **more, tie_word_embeddings=True, architectures=["Qwen3MoeForCausalLM"])
    shapes = WeightManifest.of_config(config).shapes
    with engine(tmp_path, config=config) as made:
        made.update_weights(
            ((name, torch.full(shape, 0.5)) for name, shape in shapes.items() if name != HEAD), version=0
        )
        loaded = told(servers(made)[0])["weights"]
        assert loaded[HEAD] == loaded[EMBEDDING] == 0.5 * VOCAB * 64


SIZES = dict(hidden_size=160, intermediate_size=144, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)


def test_projections_become_codes_with_one_scale_per_tile_and_the_rest_is_unchanged():
    wide = torch.randn(200, 300, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    others = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers.0.mlp.gate.weight"]
    others += ["model.layers.0.self_attn.q_proj.bias", "model.layers.0.mlp.shared_expert_gate.weight"]
    stream = [("model.layers.0.mlp.up_proj.weight", wide), *((name, torch.ones(4, 4)) for name in others)]
    found = dict(quantized(iter(stream)))
    codes, scales = (
        found.pop("model.layers.0.mlp.up_proj.weight"),
        found.pop("model.layers.0.mlp.up_proj.weight_scale_inv"),
    )
    assert codes.dtype == torch.float8_e4m3fn and codes.shape == (200, 300)
    assert scales.dtype == torch.float32 and scales.shape == (2, 3)
    assert list(found) == others and all(tensor is given for tensor, (_, given) in zip(found.values(), stream[1:]))
    # the largest magnitude of the last tile, 72 rows of 44 columns, becomes 448
    assert scales[1, 2] == pytest.approx(wide[128:, 256:].abs().max().item() / 448, rel=1e-6)
    tile_max = scales.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300] * 448
    error = (dequantize_blocks(codes, scales) - wide.float()).abs()
    assert (error <= torch.maximum(wide.float().abs() * 2**-4, tile_max * 2**-10 / 448)).all() and error.max() > 0


QUANTIZED = {
    Qwen3MoeConfig: {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    MixtralConfig: {"q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"},
}


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.model_type)
def test_exactly_the_linear_layers_of_attention_and_experts_are_quantised(kind, tmp_path):
    """By the names that save_pretrained writes and SGLang reads."""
    more = (
        dict(num_local_experts=2)
        if kind is MixtralConfig
        else dict(num_experts=2, moe_intermediate_size=48, head_dim=80)
    )
    AutoModelForCausalLM.from_config(kind(**SIZES, **more, vocab_size=64)).save_pretrained(tmp_path)
    file = SafetensorsFile(tmp_path / "model.safetensors")
    stream = [(name, file.read(name)) for name in file.tensors]
    scaled = {name.removesuffix("_scale_inv") for name, _ in quantized(iter(stream)) if name.endswith("_scale_inv")}
    assert {name.split(".")[-2] for name in scaled} == QUANTIZED[kind]
    assert all(tensor.dim() == 2 for name, tensor in stream if name in scaled)
    left = {name.split(".")[-2] for name, tensor in stream if tensor.dim() == 2 and name not in scaled}
    assert left == {"embed_tokens", "lm_head", "gate"}


def test_servers_get_codes_and_scales_and_a_matching_config(tmp_path):
    given = settings(fake_python(tmp_path), sync_dir=str(tmp_path), quantize="fp8")
    made = SGLangEngine(given, tiny_config(), stop_token_ids=(STOP,), dtype=torch.bfloat16, folder=tmp_path / "servers")
    try:
        config = json.loads((tmp_path / "servers/model/config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "fp8"
        assert config["quantization_config"]["weight_block_size"] == [128, 128]
        made.update_weights(((name, tensor.bfloat16()) for name, tensor in weights(3)), version=1)
        expected = {n: t.float().sum().item() for n, t in quantized((n, t.bfloat16()) for n, t in weights(3))}
        assert told(servers(made)[0])["weights"] == pytest.approx(expected, rel=1e-3, abs=1e-3)
        (path,) = Path(made.sender.root / made.pool.weight_version).iterdir()
        dtypes = {name: info.dtype for name, info in SafetensorsFile(path).tensors.items()}
        assert dtypes["model.layers.1.mlp.down_proj.weight"] == torch.float8_e4m3fn
        assert dtypes["model.layers.1.mlp.down_proj.weight_scale_inv"] == torch.float32
        assert dtypes["lm_head.weight"] == torch.bfloat16
    finally:
        made.close()


@pytest.mark.parametrize("version", ["0.5.17", "0.5.18"])
def test_servers_that_lose_their_cache_scales_get_them_with_the_weights(tmp_path, version):
    """Without them, 0.5.17 would end at the first load after a release of memory, and be restarted at every step."""
    given = settings(fake_python(tmp_path, version), sync_dir=str(tmp_path), quantize="fp8", colocated=True)
    common = dict(stop_token_ids=(STOP,), dtype=torch.bfloat16, folder=tmp_path / "servers")
    made = SGLangEngine(given, tiny_config(), **common)
    try:
        for step in range(2):
            made.update_weights(((name, tensor.bfloat16()) for name, tensor in weights(step)), version=step)
            made.resume()
            scales = {name: value for name, value in told(servers(made)[0])["weights"].items() if ".attn." in name}
            names = [f"model.layers.{layer}.self_attn.attn.{x}_scale" for layer in range(2) for x in "kv"]
            assert scales == (dict.fromkeys(names, 1.0) if version == "0.5.17" else {})
            made.release()
        assert made.metrics()["rollout/server_restarts"] == 0
    finally:
        made.close()


REFUSED = {"LlamaForCausalLM", "MistralForCausalLM"}


def test_architectures_whose_scales_sglang_drops_are_refused(tmp_path):
    for name in FAMILIES.keys() - REFUSED:
        check_architecture(name)
    for name in REFUSED:
        with pytest.raises(ConfigError, match=f"quantize fp8 does not go with {name}"):
            check_architecture(name)
    config = tiny_config()
    config.architectures = ["LlamaForCausalLM"]
    told = "quantize fp8 does not go with LlamaForCausalLM: SGLang drops the scales .*set quantize none"
    with pytest.raises(ConfigError, match=told):
        given = settings(fake_python(tmp_path), quantize="fp8")
        SGLangEngine(given, config, stop_token_ids=(STOP,), dtype=torch.bfloat16, folder=tmp_path / "servers")
    assert not (tmp_path / "servers").exists()


MOE = dict(num_experts=2, moe_intermediate_size=128, num_experts_per_tok=1)
LATENT = dict(q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=128)
DEEPSEEK = dict(n_routed_experts=2, n_group=1, topk_group=1, n_shared_experts=1, first_k_dense_replace=1)
YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=512, mscale=1.0, mscale_all_dim=1.0)
SPECIAL = {
    "Qwen3ForCausalLM": dict(head_dim=128),
    "MixtralForCausalLM": dict(num_local_experts=2),
    "Qwen2MoeForCausalLM": dict(**MOE, shared_expert_intermediate_size=128),
    "Qwen3MoeForCausalLM": dict(**MOE, head_dim=128),
    "DeepseekV3ForCausalLM": dict(
        **LATENT, **DEEPSEEK, moe_intermediate_size=128, num_experts_per_tok=1, rope_scaling=YARN
    ),
}
PUBLISHED = dict(moe_layer_freq=1, topk_method="noaux_tc", scoring_func="sigmoid")
"""Keys of DeepSeek's config.json that SGLang needs and transformers does not write."""


def write_stream(folder: Path, architecture: str) -> None:
    """Write a small tied model's FP8 stream of random weights, and the config.json that servers get."""
    sizes = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    kind = getattr(transformers, architecture.replace("ForCausalLM", "Config"))
    config = kind(**sizes, num_key_value_heads=2, tie_word_embeddings=True, **SPECIAL.get(architecture, {}))
    made = WeightManifest.of_config(config)
    sent = {
        name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in made.shapes.items() if name not in made.tied
    }
    folder.mkdir()
    write_changes(folder, dict(with_heads(iter(sent.items()), architecture, made.tied)))
    stream = quantized(with_heads(iter(sent.items()), architecture, made.tied))
    stream = stream if architecture in REFUSED else with_cache_scales(stream, architecture, 2)
    save_file(dict(stream), folder / "stream.safetensors")
    more = {"architectures": [architecture], "quantization_config": quantization_config()}
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), **PUBLISHED, **more}))


def write_changes(folder: Path, base: dict[str, torch.Tensor]) -> None:
    """Write weights, others that differ in 2 % of the values, and the changes between them."""
    packing, new = Packing(), {}
    for name, old in base.items():
        new[name] = torch.where(torch.rand(old.shape) < 0.02, torch.randn_like(old), old)
        packing.add(*encode(name, new[name], old)[:2])
    for file, tensors in {"base": base, "new": new, "changes": dict([packing.bucket()])}.items():
        save_file(tensors, folder / f"{file}.safetensors")


@pytest.mark.sglang
def test_sglangs_own_loaders_take_every_tensor_of_the_stream_and_changed_values(tmp_path):
    """Into SGLang's own classes, of tied models, filled with NaN before. Architectures that we refuse lose their scales."""
    for architecture in FAMILIES:
        write_stream(tmp_path / architecture, architecture)
    program = Path(__file__).parents[1] / "real_loader.py"
    environment = {**os.environ, "SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SERVER_SIDE)}
    command = [real_python(), "-P", "-W", "ignore", program, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    different = {name: found[name]["after_changes"] for name in FAMILIES}
    assert "set rollout.sglang.delta false" in different.pop("DeepseekV3ForCausalLM")
    assert len(different) >= 6 and set(map(str, different.values())) == {"[]"}, different
    for name in FAMILIES.keys() - REFUSED:
        assert found[name]["unwritten"] == [] and found[name]["wrong_scales"] == [], name
        assert found[name]["scales"] == len(list(with_cache_scales(iter(()), name, num_layers=2)))
    for name in REFUSED:
        lost = [parameter for parameter in found[name]["unwritten"] if parameter.endswith("_proj.weight_scale_inv")]
        assert len(lost) == 8


def test_cache_scales_end_the_stream_on_its_device():
    stream = iter([("model.norm.weight", torch.empty(4, device="meta"))])
    names = [
        (name, tensor.device.type, tensor.shape) for name, tensor in with_cache_scales(stream, "Qwen2ForCausalLM", 1)
    ]
    assert names == [
        ("model.norm.weight", "meta", (4,)),
        ("model.layers.0.self_attn.attn.k_scale", "meta", ()),
        ("model.layers.0.self_attn.attn.v_scale", "meta", ()),
    ]


def test_fp8_servers_need_a_model_in_bf16(tmp_path):
    with pytest.raises(ConfigError, match=r"quantize fp8 multiplies in bf16, but model.dtype is fp32"):
        ServerPlan.new(SGLangConfig(quantize="fp8"), tiny_config(), "float32", (STOP,), tmp_path)
