"""Checks that a path holds a model, and proposes model folders near it if it does not.

Change here: where they are searched, and how a message proposes them.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

from dapo_mcore.errors import CheckpointError
from dapo_mcore.model_files.megatron_folder import MEGATRON, is_megatron_folder
from dapo_mcore.model_files.model_folder import INDEX, SINGLE

Kind = Literal["Hugging Face", "Megatron", "any"]

_LISTED = 4
_GIVE = {
    "Hugging Face": "a Hugging Face model folder",
    "Megatron": "one that hf-to-mcore wrote, or a run's checkpoints/step_N",
    "any": "a Hugging Face model folder, one that hf-to-mcore wrote, or a run's checkpoints/step_N",
}


def check_model_folder(folder: Path, kind: Kind = "any") -> None:
    """Raise CheckpointError for a path without a model of that kind, and propose those near it."""
    if _is_model(folder, kind):
        return
    if not folder.is_dir():
        problem = "is not a folder"
    elif kind == "Megatron" and not is_megatron_folder(folder):
        problem = f"holds no Megatron checkpoint: it lacks {MEGATRON}/.metadata"
    elif not (folder / "config.json").is_file():
        problem = "holds no model: no config.json in it"
    else:
        problem = f"has no weights: it holds neither {SINGLE} nor {INDEX} nor {MEGATRON}/.metadata"
    raise CheckpointError(f"{folder} {problem}; give {_proposal(nearby_models(folder, kind)) or _GIVE[kind]}")


def nearby_models(folder: Path, kind: Kind = "any") -> list[Path]:
    """Return model folders of that kind that may have been meant, sorted: in a run's folder its checkpoints and exports, in a
    checkpoint's `megatron` the folder around it; for a path that does not exist those beside it with a similar name."""
    if folder.is_dir():
        found = [folder.parent, *folder.glob("*"), *folder.glob("*/*")]
    else:
        beside = {path.name: path for path in folder.parent.glob("*")}
        found = [beside[name] for name in difflib.get_close_matches(folder.name, beside, n=_LISTED)]
    return sorted(path for path in found if path.suffix != ".partial" and _is_model(path, kind))


def _is_model(folder: Path, kind: Kind) -> bool:
    has_megatron = kind != "Hugging Face" and is_megatron_folder(folder)
    has_hf = kind != "Megatron" and any((folder / name).is_file() for name in (SINGLE, INDEX))
    return (folder / "config.json").is_file() and (has_megatron or has_hf)


def _proposal(found: list[Path]) -> str:
    """Return the last ones, which are the newest of a run."""
    listed = ", ".join(str(path) for path in found[-_LISTED:])
    earlier = f" (and {len(found) - _LISTED} before)" if len(found) > _LISTED else ""
    return f"{'one of ' if len(found) > 1 else ''}{listed}{earlier}"
