"""The table of families has exactly the names and shapes of the tensors that transformers' save_pretrained writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dapo_mcore.architecture.families import FAMILIES
from dapo_mcore.architecture.mapping import hf_shapes, parameters
from dapo_mcore.architecture.shape import weight_shape
from dapo_mcore.model_files.hf_folder import SafetensorsReader
from tests.model_files.zoo import CONFIGS, MOE, config_of


@pytest.mark.parametrize("family", CONFIGS)
def test_names_and_shapes_equal_those_of_transformers(family: str, hf_folder: Callable[..., Path]) -> None:
    shape = weight_shape(config_of(family), 1)
    ours = [pair for own in parameters(shape) for pair in zip(own.hf, hf_shapes(own, shape), strict=True)]
    reader = SafetensorsReader(hf_folder(family))
    assert len(ours) == len(dict(ours))
    assert dict(ours) == {name: reader.shape(name) for name in reader.names}


def test_the_zoo_has_every_architecture() -> None:
    assert {weight_shape(config_of(family), 1).architecture for family in CONFIGS} == set(FAMILIES)


def test_experts_and_dense_layers_are_told_apart() -> None:
    mixed = weight_shape(config_of("qwen2-moe-mixed"), 1)
    for own in parameters(mixed):
        assert own.rule.per_expert == ("{expert}" in own.rule.hf[0])
        assert not (own.rule.per_expert and own.layer == 0)
    assert all(weight_shape(config_of(family), 1).num_experts == 4 for family in MOE)
