"""The FP8 stream: what is quantised under which name, how far it is off, and that it reaches servers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from dapo_mcore.kernels.fp8_quant import dequantize_blocks
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from dapo_mcore.config_sglang import SGLangConfig
from dapo_mcore.errors import ConfigError
from dapo_mcore.rollout.sglang import quantize
from dapo_mcore.rollout.sglang.engine import SGLangEngine
from dapo_mcore.rollout.sglang.quantize import quantized, with_cache_scales
from dapo_mcore.rollout.sglang.servers import ServerPlan
from dapo_mcore.weights.families import FAMILIES
from dapo_mcore.weights.safetensors_file import SafetensorsFile
from tests.rollout.sglang.fake_server import fake_python
from tests.rollout.sglang.serving import STOP, settings, tiny_config, weights
from tests.rollout.sglang.test_engine import servers, told

SIZES = dict(hidden_size=160, intermediate_size=144, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)


def test_projections_become_codes_with_a_scale_a_tile_and_the_rest_passes():
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
    """Names as save_pretrained writes them, which are those that SGLang reads."""
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


def test_servers_get_codes_and_scales_and_a_config_that_says_so(tmp_path):
    given = settings(fake_python(tmp_path), sync_dir=str(tmp_path), quantize="fp8")
    made = SGLangEngine(given, tiny_config(), stop_token_ids=(STOP,), dtype=torch.bfloat16, folder=tmp_path / "servers")
    try:
        config = json.loads((tmp_path / "servers/model/config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "fp8"
        assert config["quantization_config"]["weight_block_size"] == [128, 128]
        made.update_weights(((name, tensor.bfloat16()) for name, tensor in weights(3)), version=1)
        expected = {n: t.float().sum().item() for n, t in quantized((n, t.bfloat16()) for n, t in weights(3))}
        assert told(servers(made)[0])["weights"] == pytest.approx(expected, rel=1e-3, abs=1e-3)
        (path,) = Path(made._transfer.root / made._tag).iterdir()
        dtypes = {name: info.dtype for name, info in SafetensorsFile(path).tensors.items()}
        assert dtypes["model.layers.1.mlp.down_proj.weight"] == torch.float8_e4m3fn
        assert dtypes["model.layers.1.mlp.down_proj.weight_scale_inv"] == torch.float32
        assert dtypes["lm_head.weight"] == torch.bfloat16
    finally:
        made.close()


@pytest.mark.parametrize("version", ["0.5.17", "0.5.18"])
def test_servers_that_lose_the_scales_of_their_cache_get_them_with_the_weights(tmp_path, version):
    """0.5.17 would end at the first load after its memory was released, and be started again at every step."""
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


def test_every_architecture_says_what_its_scales_are_called():
    assert set(quantize._CACHE_SCALES) == set(FAMILIES)


def test_scales_follow_the_stream_on_its_device():
    stream = iter([("model.norm.weight", torch.empty(4, device="meta"))])
    names = [
        (name, tensor.device.type, tensor.shape) for name, tensor in with_cache_scales(stream, "LlamaForCausalLM", 1)
    ]
    assert names == [
        ("model.norm.weight", "meta", (4,)),
        ("model.layers.0.self_attn.k_proj.k_scale", "meta", ()),
        ("model.layers.0.self_attn.v_proj.v_scale", "meta", ()),
    ]


def test_fp8_servers_need_a_model_in_bf16(tmp_path):
    with pytest.raises(ConfigError, match=r"quantize fp8 multiplies in bf16, but model.dtype is fp32"):
        ServerPlan.new(SGLangConfig(quantize="fp8"), tiny_config(), "float32", (STOP,), tmp_path)
