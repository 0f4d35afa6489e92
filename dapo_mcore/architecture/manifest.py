"""The tensors that a rollout model expects, and the check of a weight stream against them.

Change here: which weight streams are accepted. Engines rely on this check: SGLang silently keeps the old values of missing
tensors, and crashes on a tensor with a wrong shape.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
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
        yield from StreamCheck(self, version).whole(weights)


class StreamCheck:
    """The check of one weight stream, which may come in parts from several ranks and threads, against the manifest."""

    def __init__(self, manifest: WeightManifest, version: int):
        self._manifest, self._version = manifest, version
        self._seen: set[str] = set()
        self._wrong: list[str] = []
        self._lock = threading.Lock()

    @property
    def fits(self) -> bool:
        """True if everything that has come so far fits the model."""
        return not self._wrong

    def passing(self, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield a part's tensors until anything in the stream does not fit the model. Drain the part in any case."""
        for name, tensor in weights:
            if self.take(name, tensor.shape):
                yield name, tensor

    def whole(self, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the only part of a stream like `passing`, and `finish` at its end."""
        yield from self.passing(weights)
        self.finish()

    def take(self, name: str, shape: Sequence[int]) -> bool:
        """Note a tensor of the stream. Return True if everything that has come so far fits the model."""
        with self._lock:
            if problem := self._problem(name, shape):
                self._wrong.append(problem)
            self._seen.add(name)
            return self.fits

    def finish(self) -> None:
        """Raise RolloutError, naming unexpected, repeated, misshapen or missing tensors. Call it once all parts have ended."""
        wrong, shapes = self._wrong, self._manifest.shapes
        if wrong:
            raise RolloutError(f"{len(wrong)} tensors of the weight stream don't fit the model: {_some(wrong, '; ')}")
        if missing := sorted(set(shapes) - set(self._manifest.tied) - self._seen):
            raise RolloutError(
                f"weight version {self._version} lacks {len(missing)} of {len(shapes)} tensors: {_some(missing)}"
            )

    def _problem(self, name: str, shape: Sequence[int]) -> str | None:
        shapes = self._manifest.shapes
        if name not in shapes:
            return f"{name} is not in the model"
        if name in self._seen:
            return f"{name} came twice"
        if list(shape) != list(shapes[name]):
            return f"{name} has shape {list(shape)}, but {list(shapes[name])} in the model"
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
