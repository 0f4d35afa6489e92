"""Environment variables and logging of a training process. Importing this module sets them; import it before torch.

Change here: library settings that are read once, while a library is loaded. A value that the user has set stays.
"""

import logging
import os
import warnings
from collections.abc import MutableMapping

from dapo_mcore.errors import ConfigError

# Threads that wait for each other sleep instead of spinning: on a busy machine spinning costs twenty times the work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# During import, megatron, torch and transformers warn about each optional package that is missing.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    "NCCL_ALGO": ("Ring",),
}
"""Values that the key `deterministic` needs, the preferred one first. cuBLAS, Transformer Engine and NCCL read them when CUDA
starts."""


def set_deterministic(environment: MutableMapping[str, str]) -> None:
    """Set the variables of DETERMINISTIC that are not set. Raise ConfigError if one has another value."""
    for name, values in DETERMINISTIC.items():
        if environment.setdefault(name, values[0]) not in values:
            raise ConfigError(
                f"deterministic true needs {name}={' or '.join(values)}, but the environment has {name}={environment[name]}; "
                "unset it, or set deterministic false"
            )
