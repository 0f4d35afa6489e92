"""Adds to a difference what the records do not hold: the text around a token, and the element of a weight.

Change here: where these are looked up. Both are extras: a folder that is gone leaves the check as it is.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dapo_mcore.architecture.mapping import Parameter, WeightReader, checkpoint_slice, parameters
from dapo_mcore.architecture.shape import WeightShape, weight_shape
from dapo_mcore.checkpoint.run_folder import checkpoint_path
from dapo_mcore.config.schema import Config
from dapo_mcore.data.detokenize import decode_responses
from dapo_mcore.errors import DapoError
from dapo_mcore.model_files.hf_config import load_hf_config, load_tokenizer
from dapo_mcore.model_files.hf_folder import open_stored
from dapo_mcore.model_files.model_folder import model_folder
from dapo_mcore.replay.compare import Check
from dapo_mcore.replay.record import read_batch
from dapo_mcore.replay.recorded_run import Runs

_BEFORE, _AFTER = 8, 4
"""Tokens whose text is shown around the one that differs."""
_BAND = 64 << 20
"""Bytes of a tensor that are read at a time."""
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def with_details(check: Check, runs: Runs, step: int) -> Check:
    """Return the check, with texts or values added if they can be read."""
    with suppress(DapoError):
        if "tensor" in check.place and check.name in ("weights before", "weights after"):
            return _with_element(check, runs, step, after=step - (check.name == "weights before"))
        if check.name == "tokens" and "position" in check.place:
            return _with_texts(check, runs, step)
    return check


def _with_element(check: Check, runs: Runs, step: int, after: int) -> Check:
    """Add the first differing element of the tensor, if both runs have weights of rollout step `after`."""
    configs = [run.config(step) for run in runs]
    folders = [weights_folder(run.path, config, after) for run, config in zip(runs, configs)]
    if None in folders or "missing" in check.place:
        return check
    element = first_element(check.place["tensor"], configs[0], *folders)
    if element is None:
        return check
    index, (ours, theirs) = ", ".join(map(str, element.index)), element.values
    detail = f"{check.detail}; {element.tensor}[{index}] is {ours!r} against {theirs!r}"
    return replace(check, detail=detail, place={**check.place, "element": element._asdict()})


def _with_texts(check: Check, runs: Runs, step: int) -> Check:
    """Add the text of the tokens around the first differing one."""
    tokenizer = load_tokenizer(runs[0].config(step).model)
    sample, position = check.place["sample"], check.place["position"]
    parts = []
    for run in runs:
        batch = read_batch(run.path, step).batch
        tokens = batch.tokens[batch.offsets[sample] : batch.offsets[sample + 1]]
        parts.append(tokens[max(0, position - _BEFORE) : position + _AFTER])
    texts = decode_responses(tokenizer, parts)
    detail = f"{check.detail}; text {texts[0]!r} against {texts[1]!r}"
    return replace(check, detail=detail, place={**check.place, "texts": texts})


class Element(NamedTuple):
    """An element of the Hugging Face tensor `tensor` with its values in both folders."""

    tensor: str
    index: list[int]
    values: list[float]


def weights_folder(run_dir: Path, config: Config, step: int) -> Path | None:
    """Return a folder with the run's weights after rollout step `step`, 0 for those at its start; None if there is none."""
    if (checkpoint := checkpoint_path(run_dir, step)).is_dir():
        return checkpoint
    is_start = step == 0 and config.model.init == "pretrained" and config.warm_start is None
    return model_folder(config.model, weights=True) if is_start else None


def first_element(name: str, config: Config, a: Path, b: Path) -> Element | None:
    """Return the first element in which a record's tensor `name` differs, None if both folders hold the same.

    Raise CheckpointError or ConfigError for a folder that cannot be read. Takes about 256 MiB of host memory.
    """
    hf_config = load_hf_config(config.model)
    readers = open_stored(a, hf_config), open_stored(b, hf_config)
    tensors = [tensor for parameter in _parameters(name, weight_shape(hf_config, 1)) for tensor in parameter.hf]
    return next(filter(None, (_first_of(tensor, *readers) for tensor in tensors)), None)


def _parameters(name: str, shape: WeightShape) -> list[Parameter]:
    """Return the parameters in a tensor of a record: a checkpoint's, with the layer's number. Experts share one."""
    layer = re.search(r"\blayers\.(\d+)", name)
    number, key = int(layer[1]) if layer else -1, _without_layer(name)
    own = [parameter for parameter in parameters(shape) if parameter.layer == number]
    return [parameter for parameter in own if _without_layer(checkpoint_slice(parameter, shape).key) == key]


def _without_layer(name: str) -> str:
    return re.sub(r"\blayers\.\d+", "layers", name)


def _first_of(tensor: str, a: WeightReader, b: WeightReader) -> Element | None:
    rows, *rest = a.shape(tensor)
    step = max(1, _BAND // (8 * max(1, int(np.prod(rest)))))
    for start in range(0, rows, step):
        ours, theirs = (reader.read(tensor, 0, start, min(rows, start + step)) for reader in (a, b))
        bits = _BITS[ours.dtype.itemsize]
        unequal = (ours.contiguous().view(bits) != theirs.contiguous().view(bits)).numpy()
        if unequal.any():
            row, *index = map(int, np.unravel_index(unequal.argmax(), unequal.shape))
            return Element(tensor, [start + row, *index], [float(part[row, *index]) for part in (ours, theirs)])
    return None
