"""The files beside exported weights: a config.json for every reader, and all that a tokenizer needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from dapo_mcore.architecture.hf_views import hf_views
from dapo_mcore.architecture.shape import weight_shape
from dapo_mcore.config.model import ModelConfig
from dapo_mcore.model_files import side_files as model_files
from dapo_mcore.model_files.hf_config import load_hf_config
from dapo_mcore.model_files.hf_folder import save_hf_folder
from dapo_mcore.model_files.side_files import both_spellings, copy_model_files, write_model_files, write_stop_tokens
from tests.model_files.zoo import CONFIGS, config_of

TRANSFORMERS_4 = "DAPO_MCORE_TRANSFORMERS4"
"""A folder for PYTHONPATH with transformers 4.57.3, huggingface_hub 0.36.2 and tokenizers 0.22.1, as .ci/run makes it."""

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 24.0}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 16,
}
SCALED = {
    "qwen2, yarn": ("qwen2", YARN),
    "llama, llama3": ("llama", LLAMA3),
    "qwen3-moe, linear": ("qwen3-moe", {"rope_type": "linear", "factor": 2.0}),
    "deepseek-v3, yarn": ("deepseek-v3", YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}),
}
MODELS = {name: (name, {"rope_type": "default"}) for name in CONFIGS} | SCALED
THETA = 50.0
"""Small, so that the scaling shows within TOKENS."""
TOKENS = 24


def hf_config(name: str) -> Any:
    family, rope = MODELS[name]
    return config_of(family, rope_parameters={"rope_theta": THETA, **rope})


# reads each folder named on standard input with the transformers of PYTHONPATH
READER = f"""
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM
assert transformers.__version__.startswith("4."), transformers.__version__
found = {{}}
for folder in json.load(sys.stdin):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(torch.arange({TOKENS})[None]).logits[0]
    found[folder] = [model.config.to_dict(), logits.tolist(), str(model.dtype)]
print(json.dumps(found))
"""


def read_by_4(folders: list[str]) -> dict[str, Any]:
    if not (path := os.environ.get(TRANSFORMERS_4)):
        pytest.skip(f"set {TRANSFORMERS_4} to a folder with transformers 4.57.3, as .ci/run makes it")
    done = subprocess.run(
        [sys.executable, "-c", READER],
        input=json.dumps(folders),
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_transformers_4_reads_the_exports_of_5(tmp_path: Path) -> None:
    """Every family and every kind of RoPE scaling: settings by hand, and equal logits."""
    models = {}
    for name in MODELS:
        config, folder = hf_config(name), tmp_path / name
        torch.manual_seed(0)
        models[str(folder)] = model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
        views = hf_views(model)
        if config.tie_word_embeddings:
            del views["lm_head.weight"]
        common = dict(shape=weight_shape(config, 1), dtype=torch.float32, hf_config=config)
        save_hf_folder(iter(views.items()), folder, **common, source=tmp_path, step=1)
    found = read_by_4(list(models))
    for name, (folder, model) in zip(MODELS, models.items()):
        (settings, logits, dtype), (family, rope) = found[folder], MODELS[name]
        scaling = None if rope["rope_type"] == "default" else rope | {"type": rope["rope_type"]}
        assert (settings["rope_theta"], settings.get("rope_scaling"), dtype) == (THETA, scaling, "torch.float32"), name
        own = CONFIGS[family][1]
        assert {key: settings[key] for key in own} == own, name
        expected = model(torch.arange(TOKENS)[None]).logits[0]
        torch.testing.assert_close(
            torch.tensor(logits), expected, atol=2e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", MODELS)
def test_a_written_config_reads_back_to_the_same_settings(name: str, tmp_path: Path) -> None:
    config = hf_config(name)
    write_model_files(tmp_path, config, torch.bfloat16, tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    ours, theirs = (tree.to_dict() for tree in (again, config))
    for tree in (ours, theirs):
        tree["rope_parameters"].pop("type", None)
        for key in ("dtype", "architectures", "_name_or_path", "transformers_version"):
            tree.pop(key, None)
    assert {key: ours[key] for key in theirs} == theirs


def test_an_export_has_the_overrides_of_its_run(model_folder: Path, tmp_path: Path) -> None:
    overrides = {"max_position_embeddings": 64, "rope_scaling": YARN}
    config = load_hf_config(ModelConfig(path=str(model_folder), overrides=overrides))
    write_model_files(tmp_path, config, torch.float32, model_folder)
    again = load_hf_config(ModelConfig(path=str(tmp_path)))
    assert again.max_position_embeddings == 64
    assert {key: again.rope_parameters[key] for key in YARN} == YARN


@pytest.mark.parametrize("stored", [None, '{"eos_token_id": 2, "top_k": 20}'])
def test_stop_tokens_are_written_beside_the_other_settings_of_generation(tmp_path: Path, stored: str | None) -> None:
    if stored:
        (tmp_path / "generation_config.json").write_text(stored)
    write_stop_tokens(tmp_path, (2, 7))
    read = GenerationConfig.from_pretrained(tmp_path)
    assert read.eos_token_id == [2, 7] and (read.top_k == 20) == bool(stored)


def test_old_keys_are_written_under_their_new_names_as_well() -> None:
    scaling = {"type": "yarn", "factor": 4.0}
    old = {"rope_theta": 1e6, "rope_scaling": scaling, "torch_dtype": "bfloat16", "num_experts": 4}
    named = scaling | {"rope_type": "yarn"}
    assert both_spellings(old) == {
        **{"rope_theta": 1e6, "rope_scaling": scaling, "rope_parameters": named | {"rope_theta": 1e6}},
        **{"torch_dtype": "bfloat16", "dtype": "bfloat16", "num_experts": 4, "num_local_experts": 4},
    }
    plain = both_spellings({"rope_theta": 1e4, "rope_scaling": None})
    assert plain["rope_parameters"] == {"rope_theta": 1e4, "rope_type": "default"}
    assert both_spellings({"hidden_size": 8}) == {"hidden_size": 8}


CUSTOM = """
from transformers import PreTrainedTokenizer
class CharTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "chars.vocab"}
    def __init__(self, vocab_file, **options):
        self._ids = {c: i for i, c in enumerate(open(vocab_file, encoding="utf-8").read().split())}
        super().__init__(**options)
    @property
    def vocab_size(self): return len(self._ids)
    def get_vocab(self): return dict(self._ids)
    def _tokenize(self, text, **_): return list(text)
    def _convert_token_to_id(self, token): return self._ids[token]
"""


def custom_folder(folder: Path) -> Path:
    """A tokenizer with its own code and vocabulary, and files that must not be copied."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": 8, "rope_theta": 7.0}))
    settings = {"auto_map": {"AutoTokenizer": ["tokenization_chars.CharTokenizer", None]}, "eos_token": "e"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenization_chars.py").write_text(CUSTOM)
    (folder / "chars.vocab").write_text("a b c d e")
    for name in (
        "model.safetensors",
        "pytorch_model.bin.index.json",
        "model.gguf",
        "README.md",
        ".git",
        "state.json",
        "manifest.json",
    ):
        (folder / name).write_text("{}")
    (folder / "original").mkdir()
    (folder / "original/params.json").write_text("{}")
    return folder


def test_a_tokenizer_with_its_own_code_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    monkeypatch.setattr(model_files, "LARGEST_FILE", 10_000)
    source = custom_folder(tmp_path / "source")
    (source / "corpus.txt").write_bytes(bytes(10_001))
    copied, written = tmp_path / "copied", tmp_path / "written"
    copied.mkdir()
    copy_model_files(source, copied)
    config = load_hf_config(ModelConfig(path=str(source)))
    write_model_files(written, config, torch.float32, source)
    whole = {"config.json", "tokenizer_config.json", "tokenization_chars.py", "chars.vocab"}
    for folder in (copied, written):
        assert {path.name for path in folder.iterdir()} - {"generation_config.json"} == whole
        assert json.loads((folder / "config.json").read_bytes())["rope_parameters"]["rope_theta"] == 7.0
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert tokenizer.encode("bad", add_special_tokens=False) == [1, 0, 3]
