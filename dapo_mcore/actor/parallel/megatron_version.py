"""The supported versions of megatron-core, and the differences between them that matter here.

Change here: to admit a version, once the tests have passed on it (tests/actor/test_next_megatron.py). The code that handles
a difference is in the module named after it:

    0.16   compares `moe_utils.te_general_gemm` with None, but defines it only with Transformer Engine: layers.layer_specs
    0.18   makes a layer's `mlp` a functools.partial instead of a ModuleSpec: layers._has_experts
    0.19   chooses some layers of latent attention itself: latent.LatentAttention
    0.19   has 65 more fields in TransformerConfig: the tables of megatron_fields.py
    0.19   writes no `common.pt`: checkpoint/checkpoint.py writes the files of checkpoints itself, with every version
"""

from __future__ import annotations

import importlib.metadata
import re

from dapo_mcore.errors import ConfigError

_FIRST, _END = (0, 16, 1), (0, 20)


def check_version(version: str | None = None) -> None:
    """Raise ConfigError if this version of megatron-core (by default the installed one) is not supported.

    Reads the package's metadata and imports nothing from it.
    """
    found = version or importlib.metadata.version("megatron-core")
    numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:3])
    if not _FIRST <= numbers < _END:
        first, end = (".".join(map(str, numbers)) for numbers in (_FIRST, _END))
        raise ConfigError(
            f"megatron-core {found} is installed, but this project runs with {first} or later and below {end}; "
            f"pip install 'megatron-core>={first},<{end}'"
        )
