"""Lets torch and the libraries below it use only kernels whose sums have a fixed order (the key `deterministic`).

Change here: a further switch of torch. Variables of the environment are in process/environment.py, and Megatron's field in
model/transformer_config.py. Our own Triton kernels have no atomics: one program makes each sum, in a fixed order.
"""

from __future__ import annotations

import os

import torch

from dapo_mcore.config.schema import Config
from dapo_mcore.errors import ConfigError
from dapo_mcore.process.environment import DETERMINISTIC, set_deterministic


def make_deterministic(config: Config) -> None:
    """Switch this process to deterministic kernels if the config asks for it. Call it before CUDA starts.

    Raises ConfigError if CUDA runs already without the variables that it needs, or if the config has a part without such kernels.
    """
    if not config.deterministic:
        return
    missing = [name for name in DETERMINISTIC if name not in os.environ]
    if missing and torch.cuda.is_initialized():
        raise ConfigError(
            f"deterministic true needs {', '.join(missing)} in the environment before CUDA starts, and this process uses CUDA "
            "already; set them before the process starts, or train by `python -m dapo_mcore.train`"
        )
    set_deterministic(os.environ)
    if torch.cuda.is_available() and config.rollout.engine == "embedded":
        raise ConfigError(
            "deterministic true with rollout.engine embedded: it samples by cumulative sums, for which a GPU has no "
            "deterministic kernel; set rollout.engine sglang, or deterministic false"
        )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # would be a pass over every new tensor, of which nothing is read
    torch.utils.deterministic.fill_uninitialized_memory = False
