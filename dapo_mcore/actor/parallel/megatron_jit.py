"""In place of megatron.core.jit: torch.compile with a CUDA device, as upstream does, and no compiler without one.

Change here: when a new megatron-core version imports further names from it. Upstream compiles small functions. On a CPU this
takes minutes and gains nothing, and the mere decoration imports the compiler, a fifth of a process's start.
"""

import sys
from typing import Any


def replace() -> None:
    """Let megatron.core import this module as its own. Call it before megatron.core is imported; later it changes nothing."""
    sys.modules.setdefault("megatron.core.jit", sys.modules[__name__])


def __getattr__(name: str) -> Any:
    if name != "jit_fuser":
        raise AttributeError(f"{__name__} has no {name}")
    import torch  # here, as the checks before a run import dapo_mcore.actor without torch

    return torch.compile if torch.cuda.is_available() else noop_decorator


def noop_decorator(function: Any) -> Any:
    return function


def enable_jit_fuser() -> None: ...


def disable_jit_fuser() -> None: ...
