"""Compares two model folders of either kind: tensor by tensor, and by the logits on a text.

Change here: what is compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dapo_mcore.architecture.mapping import parameters
from dapo_mcore.config.model import ModelConfig
from dapo_mcore.config.schema import Config
from dapo_mcore.convert.convert import Reader, num_bytes, open_model
from dapo_mcore.convert.job import Report
from dapo_mcore.model_files.hf_config import load_hf_config, load_tokenizer
from dapo_mcore.model_files.megatron_folder import is_megatron_folder


@dataclass(frozen=True)
class Entry:
    """A tensor of the manifest; `sha256` is of its bytes, row by row."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str

    def __str__(self) -> str:
        return f"{list(self.shape)} {self.dtype} {self.sha256[:12]}"


def manifest(folder: Path, report: Report) -> dict[str, Entry]:
    """Yield every HF tensor of the folder, one at a time."""
    reader, shape = open_model(folder)
    names = [name for parameter in parameters(shape) for name in parameter.hf]
    report.start(sum(num_bytes(reader, name) for name in names), 0)
    return dict(_entries(reader, names, report))


def differences(ours: dict[str, Entry], theirs: dict[str, Entry]) -> list[str]:
    """Yield a line for each tensor that differs or that only one folder has."""
    lines = [f"{name}: only in the first" for name in ours.keys() - theirs.keys()]
    lines += [f"{name}: only in the second" for name in theirs.keys() - ours.keys()]
    both = [name for name in ours if name in theirs and ours[name] != theirs[name]]
    return sorted(lines) + [f"{name}: {ours[name]} in the first, {theirs[name]} in the second" for name in both]


def logits_on_text(folder: Path, text: str) -> Tensor:
    """Return logits, float32 [tokens, vocabulary], from transformers for an HF folder and from Megatron for the other kind."""
    model = ModelConfig(path=str(folder))
    tokens = torch.tensor(load_tokenizer(model).encode(text))[None]
    return _megatron_logits(folder, tokens) if is_megatron_folder(folder) else _transformers_logits(folder, tokens)


def _entries(reader: Reader, names: list[str], report: Report) -> Iterator[tuple[str, Entry]]:
    for name in names:
        tensor = reader.read(name)
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        yield (
            name,
            Entry(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), hashlib.sha256(raw).hexdigest()),
        )
        report.advance(tensor.nbytes)


@torch.no_grad()
def _transformers_logits(folder: Path, tokens: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()(tokens).logits[0]


@torch.no_grad()
def _megatron_logits(folder: Path, tokens: Tensor) -> Tensor:
    from dapo_mcore.actor.model.policy import build_policy
    from dapo_mcore.actor.parallel import layout as layouts
    from dapo_mcore.architecture.shape import weight_shape
    from dapo_mcore.model_files.hf_folder import open_weights

    config = Config.model_validate({"model": {"path": str(folder)}, "data": {"files": "none"}})
    layout = layouts.start(config.parallel, seed=0)
    try:
        hf_config = load_hf_config(config.model)
        shape = weight_shape(hf_config, 1)
        policy = build_policy(config, hf_config, layout)
        policy.load_weights(open_weights(config.model, hf_config, 0), shape, layout)
        tokens = tokens.to(layout.device)
        positions = torch.arange(tokens.size(1), device=layout.device)[None]
        (model,) = policy
        hidden = model(tokens, positions, None)[:, 0]
        return (hidden @ model.head_weight().t())[:, : shape.vocab_size].float().cpu()
    finally:
        layouts.stop()
