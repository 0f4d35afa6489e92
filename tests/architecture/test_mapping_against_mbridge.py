"""Our Megatron parameters against those of mbridge, another HF ↔ Megatron bridge: names, merges and TP splits.

Only its mapping runs, on CPU: the HF tensors of a Megatron parameter, how they are merged, and how the result is split.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

import pytest
import torch

from dapo_mcore.architecture.mapping import Parameter, hf_shapes, import_parameter, local_shape, parameters
from dapo_mcore.architecture.shape import WeightShape, weight_shape
from tests.actor.parity import DictReader
from tests.model_files.zoo import config_of

VERSION = "0.15.1"
FAMILIES = ["qwen2", "qwen2-tied", "qwen3", "llama", "mixtral", "qwen2-moe", "qwen3-moe"]
"""mbridge has no Mistral, in Qwen2-MoE no layers without experts, and its DeepSeek-V3 does not fit megatron-core 0.16.1."""


def installed() -> str | None:
    return importlib.metadata.version("mbridge") if importlib.util.find_spec("mbridge") else None


pytestmark = pytest.mark.skipif(
    installed() != VERSION,
    reason=f"mbridge {VERSION} is not installed; pip install mbridge=={VERSION} einops, or the extra `mbridge`",
)


def bridge_of(family: str, num_ranks: int) -> Any:
    from mbridge.core.auto_bridge import _MODEL_REGISTRY
    from mbridge.core.parallel_states import ParallelStates

    config = config_of(family)
    # mbridge does not expect the null that Mixtral's config has
    config.head_dim = weight_shape(config, 1).head_dim
    states = ParallelStates(tp_size=num_ranks, etp_size=num_ranks)
    kind = _MODEL_REGISTRY[config.model_type]
    # a tied model changes its class's table, which later models would use
    own = type(kind.__name__, (kind,), {"_DIRECT_MAPPING": dict(kind._DIRECT_MAPPING)})
    return own(config, dtype=torch.float32, parallel_states=states)


def random_state(shape: WeightShape) -> dict[str, torch.Tensor]:
    noise = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(size, generator=noise)
        for parameter in parameters(shape)
        for name, size in zip(parameter.hf, hf_shapes(parameter, shape), strict=True)
    }


def theirs(
    bridge: Any, parameter: Parameter, state: dict[str, torch.Tensor], shape: WeightShape, num_ranks: int
) -> tuple[list[str], list[torch.Tensor]]:
    """Return the HF names and each rank's part by mbridge, which knows only the names of Transformer Engine's layers."""
    name = parameter.names[-1]
    names = bridge._weight_name_mapping_mcore_to_hf(name)
    merged = bridge._weight_to_mcore_format(name, [state[own] for own in names])
    if parameter.rule.is_vocab:  # mbridge pads it to another size
        merged = torch.cat([merged, merged.new_zeros(shape.padded_vocab_size - len(merged), merged.shape[1])])
    local = torch.empty(local_shape(parameter, shape, num_ranks))
    return names, list(bridge._weight_split_across_tp(name, merged, local, num_ranks))


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_equal_those_of_mbridge(family: str, num_ranks: int) -> None:
    shape = weight_shape(config_of(family), num_ranks)
    state, bridge = random_state(shape), bridge_of(family, num_ranks)
    reader, compared = DictReader(state), 0
    for parameter in parameters(shape):
        names, parts = theirs(bridge, parameter, state, shape, num_ranks)
        assert tuple(names) == parameter.hf
        for rank, part in enumerate(parts):
            ours = import_parameter(parameter, reader, shape, rank, num_ranks)
            assert torch.equal(ours, part), (parameter.names, rank)
            compared += 1
    assert compared == num_ranks * len(list(parameters(shape)))
