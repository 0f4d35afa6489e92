"""Model folders with one mistake each: one line names the file, the number and what to do, before anything is built."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dapo_mcore.architecture.reader import read_architecture
from dapo_mcore.config.model import ModelConfig
from dapo_mcore.errors import DapoError
from dapo_mcore.model_files.hf_config import check_tokenizer_fits, load_hf_config, load_tokenizer
from dapo_mcore.model_files.hf_folder import open_stored
from tests.model_files.character_model import CONFIG
from tests.model_files.zoo import config_of


def check(folder: Path, **settings: Any) -> None:
    """Check everything about a model folder that can be checked before its weights are read."""
    model = ModelConfig(path=str(folder), **settings)
    hf_config = load_hf_config(model)
    read_architecture(hf_config, longest_sequence=64)
    check_tokenizer_fits(load_tokenizer(model), hf_config)
    if model.init == "pretrained":
        open_stored(folder, hf_config)


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "hidden 0": ({"hidden_size": 0}, r"hidden_size 0 must be a whole number from 1 to 2147483647; correct the numbers"),
    "key-value heads 3": ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
    "eps NaN": ({"rms_norm_eps": float("nan")}, "config.json is not valid JSON: NaN is no number of JSON"),
    "two numbers": ({"hidden_size": 0, "vocab_size": -1}, "vocab_size -1 must be .*; hidden_size 0 must be"),
    "unknown rope": ({"rope_scaling": {"type": "spiral"}}, "rope_type 'spiral' is not supported .*; supported are default"),
    "yarn without factor": ({"rope_scaling": {"type": "yarn"}}, "factor"),
    "activation": ({"hidden_act": "swoosh"}, "hidden_act 'swoosh' in config.json is not supported .*; supported is 'silu'"),
    "unknown keys": ({"a_new_idea": 1, "another": 2}, "a_new_idea 1, another 2 in config.json are not understood"),
    "quantized": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config .* dequantize"),
    "unknown type": ({"model_type": "unheard-of"}, "transformers cannot read .*unheard-of"),
    "no type": ({"model_type": None}, "transformers cannot read"),
    "architecture": ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not supported"),
}  # fmt: skip


@pytest.fixture
def copy(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def assert_told(folder: Path, message: str, **settings: Any) -> None:
    with pytest.raises(DapoError, match=message) as caught:
        check(folder, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", SETTINGS)
def test_a_config_json_that_no_model_can_have_is_refused(case: str, copy: Path) -> None:
    changes, message = SETTINGS[case]
    (copy / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    assert_told(copy, message, init="random")


def test_overrides_are_checked_as_config_json_is(model_folder: Path) -> None:
    assert_told(
        model_folder, "model.overrides over .*: hidden_size 0 must", init="random", overrides={"hidden_size": 0}
    )


def without_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


TOKENIZERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (without_tokenizer, "no tokenizer can be loaded from .*; it needs tokenizer.json"),
    "truncated": (lambda folder: os.truncate(folder / "tokenizer.json", 200), "no tokenizer can be loaded from"),
    "larger than the model": (
        lambda folder: (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 50})),
        "has id 99, but the model has vocab_size 50; use the model's own tokenizer",
    ),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_cannot_be_used_is_refused(case: str, copy: Path) -> None:
    damage, message = TOKENIZERS[case]
    damage(copy)
    assert_told(copy, message, init="random")


@pytest.fixture(scope="module")
def whole(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that also has weights, in two files."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("whole") / "model"
    AutoModelForCausalLM.from_config(config_of("qwen2", vocab_size=128)).save_pretrained(folder, max_shard_size="50KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model_folder / name, folder / name)
    check(folder)
    return folder


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def add_tensor(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_bytes())
    save_file({"surplus": torch.ones(2)}, folder / "surplus.safetensors")
    index["weight_map"]["surplus"] = "surplus.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


WEIGHTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "header": (lambda folder: os.truncate(first_shard(folder), 20), "is truncated: its header .*; fetch it again"),
    "data": (
        lambda folder: os.truncate(first_shard(folder), 20_000),
        "is truncated: .* ends at byte .*; fetch it again",
    ),
    "missing shard": (lambda folder: first_shard(folder).unlink(), "is missing; fetch the whole folder again"),
    "surplus": (add_tensor, "1 tensors that Qwen2ForCausalLM does not have, such as surplus"),
    "no weights": (
        lambda folder: [path.unlink() for path in folder.glob("model*")],
        "holds neither model.safetensors nor .*; give a folder with weights, or set model.init random",
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_are_not_complete_are_refused(case: str, whole: Path, tmp_path: Path) -> None:
    damage, message = WEIGHTS[case]
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    damage(folder)
    assert_told(folder, message)
