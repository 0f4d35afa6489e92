"""Loads weight streams into SGLang's own model classes, on a CPU. A program for SGLang's interpreter; its argument is a folder.

The folder has one folder per architecture, with config.json and stream.safetensors. Parameters are filled with NaN before the
load. Prints as JSON, per architecture, the parameters that still hold NaN, and the scales of the KV cache that are not 1. And what
changed values do to unquantised weights: those of base.safetensors, then changes.safetensors, must be those of new.safetensors.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from dapo_mcore_delta import bits, load
from safetensors.torch import load_file
from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
from sglang.srt.layers.dp_attention import initialize_dp_attention
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.runtime_context import SpawnRanks, publish
from sglang.srt.server_args import ServerArgs
from transformers import AutoConfig

# modules whose name is not that of the class in lower case
MODULES = {"DeepseekV3": "deepseek_v2", "Qwen2Moe": "qwen2_moe", "Qwen3Moe": "qwen3_moe"}
_NAN_FP8 = 0x7F


def prepare(folder: Path) -> None:
    """Set up what SGLang's layers need: settings of a server, and process groups of one process."""
    options = dict(device="cpu", attention_backend="torch_native", sampling_backend="pytorch", grammar_backend="none")
    more = dict(skip_tokenizer_init=True, disable_overlap_schedule=True, load_format="dummy", dtype="bfloat16")
    settings = ServerArgs(model_path=str(folder), **options, **more)
    publish(settings, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
    init_distributed_environment(1, 0, f"file://{folder}/store", 0, backend="gloo")
    initialize_model_parallel(backend="gloo")
    initialize_dp_attention(settings)
    torch.set_default_dtype(torch.bfloat16)


def built(folder: Path, quantized: bool) -> torch.nn.Module:
    family = folder.name.removesuffix("ForCausalLM")
    module = importlib.import_module(f"sglang.srt.models.{MODULES.get(family, family.lower())}")
    config = AutoConfig.from_pretrained(folder)
    quant_config = Fp8Config.from_config(config.quantization_config) if quantized else None
    return getattr(module, folder.name)(config, quant_config=quant_config)


def after_changes(folder: Path) -> str | list[str]:
    """Return the parameters that differ from those of a whole load after changed values came, or the error."""
    model, twin = built(folder, quantized=False), built(folder, quantized=False)
    for one, file in ((model, "base"), (twin, "new")):
        for parameter in one.parameters():
            parameter.data.zero_()
        one.load_weights(iter(load_file(folder / f"{file}.safetensors").items()))
    load(model, [])
    try:
        model.load_weights(iter(load_file(folder / "changes.safetensors").items()))
    except Exception as error:
        return str(error)
    expected = dict(twin.named_parameters())
    return [name for name, value in model.named_parameters() if not torch.equal(bits(value), bits(expected[name]))]


def loaded(folder: Path) -> dict[str, Any]:
    model = built(folder, quantized=True)
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        fp8 = parameter.dtype == torch.float8_e4m3fn
        parameter.data.view(torch.uint8).fill_(_NAN_FP8) if fp8 else parameter.data.fill_(float("nan"))
    model.load_weights(iter(load_file(folder / "stream.safetensors").items()))
    scales = {name: p.item() for name, p in parameters.items() if name.endswith((".k_scale", ".v_scale"))}
    return {
        "unwritten": [name for name, p in parameters.items() if p.float().isnan().any()],
        "scales": len(scales),
        "after_changes": after_changes(folder),
        "wrong_scales": [name for name, value in scales.items() if value != 1],
    }


if __name__ == "__main__":
    folders = sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir())
    prepare(folders[0])
    print(json.dumps({folder.name: loaded(folder) for folder in folders}))
