"""The tensors that a rollout model expects, and the check of a weight stream against them.

Change here: which weight streams are accepted. Engines rely on this check: SGLang silently keeps the old values of missing
tensors, and crashes on a tensor with a wrong shape.
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
"""(HF name, tensor) pairs that are sent together."""


@dataclass(frozen=True)
class WeightManifest:
    """The tensors of a model.

    shapes  the shape of every tensor, by HF name
    tied    for each name that shares another tensor's storage, the name that owns the storage
    """

    shapes: dict[str, torch.Size]
    tied: dict[str, str]

    @classmethod
    def of_model(cls, model: torch.nn.Module) -> WeightManifest:
        """Return the manifest of a transformers model."""
        return cls({name: view.shape for name, view in hf_views(model).items()}, _tied_names(model))

    @classmethod
    def of_config(cls, hf_config: PretrainedConfig) -> WeightManifest:
        """Return the manifest of the model that a config describes. Allocates no weights."""
        with torch.device("meta"):
            return cls.of_model(AutoModelForCausalLM.from_config(hf_config))

    def checked(self, weights: Iterator[tuple[str, Tensor]], version: int) -> Iterator[tuple[str, Tensor]]:
        """Yield the stream's tensors until one does not fit the model. A tied name may be absent.

        Drains the stream in any case, because the senders' collectives must complete. Raises RolloutError at its end, naming
        unexpected, repeated, misshapen or missing tensors.
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
            return f"{name} has shape {list(tensor.shape)}, but {list(self.shapes[name])} in the model"
        return None


def buckets(weights: Iterator[tuple[str, Tensor]], limit: int) -> Iterator[tuple[Bucket, bool]]:
    """Yield (bucket, True if it is the last). A bucket holds at most `limit` bytes, or a single larger tensor.

    Holds one bucket and the tensor after it at a time. An error in the stream is raised before the last bucket is yielded.
    Does not copy tensors.
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
    all_names = model.named_parameters(remove_duplicate=False)
    return {name: owners[id(parameter)] for name, parameter in all_names if owners[id(parameter)] != name}


def _some(items: list[str], separator: str = ", ", limit: int = 8) -> str:
    more = f"{separator}and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + more
