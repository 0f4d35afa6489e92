"""Views of a model in memory under the names of its file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dapo_mcore.architecture.hf_views import hf_views
from dapo_mcore.architecture.manifest import WeightManifest
from dapo_mcore.architecture.mapping import parameters
from dapo_mcore.architecture.shape import weight_shape
from tests.model_files.zoo import CONFIGS, config_of


@pytest.mark.parametrize("family", CONFIGS)
def test_writing_to_the_views_changes_the_model(family: str, hf_folder: Callable[..., Path]) -> None:
    """Names and shapes equal those of the weight table and so of the weight stream. With the values of a file that
    transformers wrote, the model computes the same as one that transformers loaded."""
    folder = hf_folder(family)
    model = AutoModelForCausalLM.from_config(config_of(family)).requires_grad_(False)
    views, stored = hf_views(model), load_file(folder / "model.safetensors")
    table = {name for parameter in parameters(weight_shape(config_of(family), 1)) for name in parameter.hf}
    assert stored.keys() == table == views.keys() - WeightManifest.of_config(config_of(family)).tied.keys()
    for name, tensor in stored.items():
        assert views[name].shape == tensor.shape
        views[name].copy_(tensor)
    tokens = torch.arange(24).view(2, 12)
    expected = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.eval()(tokens).logits, expected.eval()(tokens).logits)
