"""The weights of a transformers model by the names that files have.

Change here: how names in memory become names on disk. In memory transformers 5 fuses what files, SGLang and the weight
table (families.py) keep apart: the experts of a layer are one tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion


class _Uncopied(Tensor):
    """A tensor whose parts stay views: transformers makes each part of a fused tensor contiguous, which would copy it."""

    def contiguous(self, *_: Any, **__: Any) -> Tensor:
        return self


def hf_views(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return every weight of a transformers model by its name on disk, as a view: what is written to it, the model has.

    By transformers' own conversion, so that no table of ours says what it fuses. Also of a model on the meta device.
    """
    state = model.state_dict()
    parts = revert_weight_conversion(model, {name: tensor.as_subclass(_Uncopied) for name, tensor in state.items()})
    views = {name: part.as_subclass(Tensor) for name, part in parts.items()}
    storages = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    assert all(view.untyped_storage().data_ptr() in storages for view in views.values()), "transformers copied a weight"
    return views
