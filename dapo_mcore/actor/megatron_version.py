"""Which versions of megatron-core run, and what differs between them in what this project touches.

Change here: to admit a version, once the tests have run on it (tests/actor/test_next_megatron.py). The code that copes with
a difference stands beside what it replaces:

    0.16   `moe_utils.te_general_gemm` is tested for None, but exists only beside Transformer Engine    layers.layer_specs
    0.18   a layer's `mlp` is a functools.partial instead of a ModuleSpec                               layers._has_experts
    0.19   latent attention chooses some of its layers itself                                    latent.LatentAttention
    0.19   65 more fields of TransformerConfig                                                   megatron_fields.REFUSED …
    0.19   a checkpoint has no `common.pt`                                                       weights/checkpoint.py
"""

from __future__ import annotations

import importlib.metadata
import re

from dapo_mcore.errors import ConfigError

_FIRST, _END = (0, 16, 1), (0, 20)


def check_version(version: str | None = None) -> None:
    """Raise ConfigError if megatron-core (by default the installed one) is not a version that this project runs with.

    Reads the package's metadata and imports nothing of it.
    """
    found = version or importlib.metadata.version("megatron-core")
    numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:3])
    if not _FIRST <= numbers < _END:
        first, end = (".".join(map(str, numbers)) for numbers in (_FIRST, _END))
        raise ConfigError(
            f"megatron-core {found} is installed, but this project runs with {first} or later and below {end}; "
            f"pip install 'megatron-core>={first},<{end}'"
        )
