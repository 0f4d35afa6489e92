"""Helpers of the conversion tests: convert to Megatron and back, compare the folders, and make folders with a flaw."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dapo_mcore.convert.convert import Cut, hf_to_mcore, mcore_to_hf
from dapo_mcore.convert.job import NoReport
from dapo_mcore.model_files.side_files import both_spellings
from tests.model_files.zoo import TEXTS

Folders = Callable[..., Path]
WHOLE = Cut()
SMALL, ONE_FILE = 20_000, 5_000_000_000
"""Bytes per file: about ten files, or all in one."""
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors as the safetensors package reads them."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same_model(ours: Path, theirs: Path) -> None:
    """Compare names, dtypes, shapes and bytes of all tensors, all settings, and every other file but the index."""
    found, expected = tensors_of(ours), tensors_of(theirs)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(raw(found[name]), raw(tensor)), name
    others = [path.name for path in theirs.iterdir() if "safetensors" not in path.name]
    assert {path.name for path in ours.iterdir() if "safetensors" not in path.name} == set(others)
    differing = [name for name in others if (ours / name).read_bytes() != (theirs / name).read_bytes()]
    assert set(differing) <= {"config.json"}
    assert both_spellings(config_of(theirs)) == config_of(ours)
    assert {"config.json", "generation_config.json", *TEXTS} <= set(others)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_bytes())


def round_trip(source: Path, work: Path, cut: Cut = WHOLE, shard_bytes: int = ONE_FILE) -> Path:
    hf_to_mcore(source, work / "mcore", cut, NoReport())
    mcore_to_hf(work / "mcore", work / "hf", NoReport(), shard_bytes)
    return work / "hf"


def round_trip_back(mcore: Path, work: Path) -> Path:
    mcore_to_hf(mcore, work / "back", NoReport())
    return work / "back"


def edited_copy(source: Path, work: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """Return a copy of the folder whose tensors, in one file, are changed by `edit`."""
    copy = Path(shutil.copytree(source, work / "source"))
    state = load_file(copy / "model.safetensors")
    edit(state)
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    return copy


def set_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | changes))
