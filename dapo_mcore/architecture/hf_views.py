"""Views of a transformers model's weights under their names on disk.

Change here: how names in memory become names on disk. In memory, transformers 5 fuses the experts of a layer into one
tensor; files, SGLang and the weight rules keep them apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion


class _NeverCopied(Tensor):
    """A tensor whose parts stay views: transformers makes each part of a fused tensor contiguous, and that would copy it."""

    def contiguous(self, *_: Any, **__: Any) -> Tensor:
        return self


def hf_views(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return every weight of a transformers model by its name on disk, as a view: writing to it changes the model.

    Uses transformers' own conversion, so this project needs no table of fused tensors. Works on the meta device too.
    """
    state = model.state_dict()
    parts = revert_weight_conversion(model, {name: tensor.as_subclass(_NeverCopied) for name, tensor in state.items()})
    views = {name: part.as_subclass(Tensor) for name, part in parts.items()}
    storages = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    assert all(view.untyped_storage().data_ptr() in storages for view in views.values()), "transformers copied a weight"
    return views
