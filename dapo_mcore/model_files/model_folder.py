"""The folder of the model that `model.path` names: a folder, or a snapshot of a model on the Hugging Face hub.

Change here: which files of a model on the hub are downloaded. Weights are safetensors, never pickle, and code is taken only with
model.trust_remote_code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from dapo_mcore.config.model import ModelConfig
from dapo_mcore.errors import ConfigError
from dapo_mcore.hub import HubRepo, download

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_HUB_NAME = re.compile(r"(?:hf://)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)", re.ASCII)
_SIDE_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_CODE = ("*.py",)
_WEIGHTS = ("model*.safetensors",)
_NEVER = ("*/*",)
"""Folders hold other formats, such as original/ and onnx/."""


def hub_name(path: str) -> str | None:
    """Return the name of a model on the hub that a path means, or None. What exists here is a folder, and what lies in one
    that exists is meant as one."""
    found = _HUB_NAME.fullmatch(path)
    if found is None or (not path.startswith("hf://") and (Path(path).exists() or Path(path).parent.is_dir())):
        return None
    return found[1]


def model_folder(model: ModelConfig, *, weights: bool = False) -> Path:
    """Return the model's folder with config.json and tokenizer files, and with its weights if asked for.

    A model on the hub is downloaded into the cache, by one process of each node. Raise ConfigError for a path that is neither, a
    revision of a folder, a model without safetensors, and as hub.download does.
    """
    name = hub_name(model.path)
    if name is not None:
        return _snapshot(name, model.revision, model.trust_remote_code, weights)
    folder = Path(model.path)
    if not folder.is_dir():
        raise ConfigError(
            f"model.path {model.path!r} is not a folder; give a local Hugging Face model folder, or the name of a model on the "
            "hub: Qwen/Qwen2.5-7B, or hf://Qwen/Qwen2.5-7B where a folder Qwen exists"
        )
    if model.revision is not None:
        raise ConfigError(
            f"model.revision {model.revision} is for a model on the hub, but model.path {model.path!r} is a folder here; set "
            "model.revision null"
        )
    return folder


def side_files_folder(model: ModelConfig) -> Path:
    """Return the model's folder for a copy of its side files. It need not be there any more: a run does not end for that."""
    return Path(model.path) if hub_name(model.path) is None else model_folder(model)


def check_same_folder(model: ModelConfig, names: Sequence[str]) -> None:
    """Raise ConfigError if ranks would read different models. names  of model_folder, of each rank; on the hub they are commits.

    A branch may move while a job starts, and caches of nodes that do not reach the hub may be of different ages.
    """
    other = next((rank for rank, name in enumerate(names) if name != names[0]), None)
    if other is not None:
        raise ConfigError(
            f"model.path {model.path} is {names[0]} on rank 0, but {names[other]} on rank {other}; set model.revision to a commit, "
            "or let all nodes share one cache (HF_HOME)"
        )


def has_weights(folder: Path) -> bool:
    """Return True if the folder has all weight files that it speaks of."""
    index = folder / INDEX
    if not index.is_file():
        return (folder / SINGLE).is_file()
    try:
        files = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return True  # open_stored says what is wrong with it
    return all((folder / file).is_file() for file in files)


@cache  # one answer in the life of a process, whatever the hub says later
def _snapshot(name: str, revision: str | None, code: bool, weights: bool) -> Path:
    repo = HubRepo("model", name, revision, "model.path")
    side_files = [*_SIDE_FILES, *(_CODE if code else ())]
    if not weights:
        return download(repo, side_files, _NEVER)
    commit = _snapshot(name, revision, code, False).name  # a branch may move meanwhile
    folder = download(replace(repo, revision=commit), [*side_files, *_WEIGHTS], _NEVER)
    if not has_weights(folder):
        raise ConfigError(
            f"model.path: {repo} has no safetensors, or the cache lacks some of them ({folder}); pickled weights are never "
            f"loaded: take a revision with {SINGLE}, or convert it, and if HF_HUB_OFFLINE is set run `hf download {name}` first"
        )
    return folder
