"""The files of a model folder other than weights: config.json, tokenizer, custom code.

Change here: which files are copied with exported weights, and how config.json names what transformers 5 renamed.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dapo_mcore.model_files.manifest import MANIFEST

CONFIG = "config.json"
GENERATION = "generation_config.json"
LARGEST_FILE = 256_000_000
"""Bytes; the largest public vocabularies have a seventh of it."""

_WEIGHTS = (
    *(".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".distcp", ".gguf", ".h5", ".msgpack", ".onnx"),
    *(".npy", ".npz", ".zip", ".tar", ".gz"),
)
_NOT_COPIED = (CONFIG, "state.json", MANIFEST)
"""The first is written anew; the others are a checkpoint's (checkpoint/checkpoint.py)."""

_RENAMED = (("torch_dtype", "dtype"), ("num_experts", "num_local_experts"))
"""Keys by the names in transformers 4 and 5, each ignored by the other for some family."""


def write_model_files(folder: Path, hf_config: Any, dtype: torch.dtype, source: Path) -> None:
    """Write config.json, which names the dtype of the weights, and copy the other files of `source`."""
    config = copy.deepcopy(hf_config)
    config.dtype = dtype
    config.save_pretrained(folder)
    _write_config(folder, json.loads((folder / CONFIG).read_bytes()))
    _copy_others(source, folder)


def write_stop_tokens(folder: Path, token_ids: Sequence[int]) -> None:
    """Let generation stop at these tokens: eos_token_id of generation_config.json, whose other settings stay."""
    path = folder / GENERATION
    settings = json.loads(path.read_bytes()) if path.is_file() else {}
    settings["eos_token_id"] = list(token_ids)
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_model_files(source: Path, folder: Path) -> None:
    """Write config.json with the settings of `source`'s, and copy the other files."""
    _write_config(folder, json.loads((source / CONFIG).read_bytes()))
    _copy_others(source, folder)


def both_spellings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a config.json so that transformers 4 and 5, and tools written for either, read the same.

    transformers 4 reads `rope_theta` and `rope_scaling` and silently ignores `rope_parameters`: it would use its default theta
    and no scaling.
    """
    config = dict(config)
    for old, new in _RENAMED:
        if (value := config.get(new, config.get(old))) is not None:
            config[old] = config[new] = value
    if rope := config.get("rope_parameters"):
        config["rope_theta"] = rope["rope_theta"]
        config["rope_scaling"] = _scaling({key: value for key, value in rope.items() if key != "rope_theta"})
    elif "rope_theta" in config:
        scaling = _scaling(config.get("rope_scaling") or {}) or {"rope_type": "default"}
        config["rope_parameters"] = scaling | {"rope_theta": config["rope_theta"]}
    return config


def _scaling(rope: dict[str, Any]) -> dict[str, Any] | None:
    """Return `rope_scaling` with its kind under the names of every version; None if nothing is scaled."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    return None if kind == "default" else rope | {"rope_type": kind, "type": kind}


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    text = json.dumps(both_spellings(config), indent=2, sort_keys=True, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def _copy_others(source: Path, folder: Path) -> None:
    """Copy what a tokenizer or a model's own code may need, whatever its name: all of `source` but the weights.

    Not copied: subfolders, hidden files, notes (*.md) and files above LARGEST_FILE. If the folder was moved away since the
    run began, only these files are missing, not the weights.
    """
    for file in sorted(source.iterdir()) if source.is_dir() else ():
        if _goes_along(file):
            shutil.copyfile(file, folder / file.name)


def _goes_along(file: Path) -> bool:
    if file.name in _NOT_COPIED or file.name.startswith(".") or file.name.lower().endswith((*_WEIGHTS, ".md")):
        return False
    return file.is_file() and file.stat().st_size <= LARGEST_FILE
