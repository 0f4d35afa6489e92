"""The tensors that a rollout model takes, and the check of a weight stream against them.

Change here: what makes a weight stream acceptable. Engines rely on it: SGLang takes a checkpoint that lacks tensors
without a word, keeping the old ones, and dies of a tensor of another shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from dapo_mcore.architecture.hf_views import hf_views
from dapo_mcore.errors import RolloutError

Bucket = list[tuple[str, Tensor]]
"""Named tensors that travel together."""


@dataclass(frozen=True)
class WeightManifest:
    """shapes: of every tensor by HF name. tied: each name that shares another's storage, with the name that owns it."""

    shapes: dict[str, torch.Size]
    tied: dict[str, str]

    @classmethod
    def of_model(cls, model: torch.nn.Module) -> WeightManifest:
        return cls({name: view.shape for name, view in hf_views(model).items()}, _tied_names(model))

    @classmethod
    def of_config(cls, hf_config: PretrainedConfig) -> WeightManifest:
        """The same without allocating the model."""
        with torch.device("meta"):
            return cls.of_model(AutoModelForCausalLM.from_config(hf_config))

    def checked(self, weights: Iterator[tuple[str, Tensor]], version: int) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the stream, each one checked; nothing more is passed on after the first that does not fit.

        Drains the stream even then: the senders' collectives must complete. A tied name may be absent. Raises
        RolloutError at the end, naming unexpected, repeated, misshapen or missing tensors.
        """
        seen: set[str] = set()
        wrong: list[str] = []
        for name, tensor in weights:
            if problem := self._problem(name, tensor, seen):
                wrong.append(problem)
            seen.add(name)
            if not wrong:
                yield name, tensor
        if wrong:
            raise RolloutError(f"{len(wrong)} tensors of the weight stream don't fit the model: {_some(wrong, '; ')}")
        if missing := sorted(set(self.shapes) - set(self.tied) - seen):
            raise RolloutError(
                f"weight version {version} lacks {len(missing)} of {len(self.shapes)} tensors: {_some(missing)}"
            )

    def _problem(self, name: str, tensor: Tensor, seen: set[str]) -> str | None:
        if name not in self.shapes:
            return f"{name} is not in the model"
        if name in seen:
            return f"{name} came twice"
        if tensor.shape != self.shapes[name]:
            return f"{name} has shape {list(tensor.shape)}, the model {list(self.shapes[name])}"
        return None


def buckets(weights: Iterator[tuple[str, Tensor]], limit: int) -> Iterator[tuple[Bucket, bool]]:
    """Buckets of at most `limit` bytes (a larger tensor makes one of its own), each with whether it is the last.

    One bucket is in memory at a time, and the tensor that did not fit into it. An error of the stream comes before its
    last bucket. Tensors are not copied.
    """
    bucket: Bucket = []
    size = 0
    for name, tensor in weights:
        if bucket and size + tensor.nbytes > limit:
            yield bucket, False
            bucket, size = [], 0
        bucket.append((name, tensor.detach()))
        size += tensor.nbytes
    yield bucket, True


def _tied_names(model: torch.nn.Module) -> dict[str, str]:
    owners = {id(parameter): name for name, parameter in model.named_parameters()}
    everything = model.named_parameters(remove_duplicate=False)
    return {name: owners[id(parameter)] for name, parameter in everything if owners[id(parameter)] != name}


def _some(items: list[str], separator: str = ", ", limit: int = 8) -> str:
    more = f"{separator}and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + more
