"""The setting of a start: what may change results besides configuration and data.

Change here: a further package, or a switch that changes roundings.
"""

from __future__ import annotations

import os
import platform
from collections import Counter
from importlib.metadata import PackageNotFoundError, version

import torch

from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.config.schema import Config
from dapo_mcore.process.environment import DETERMINISTIC
from dapo_mcore.replay.record import Setting

_PACKAGES = ("dapo_mcore", "torch", "megatron-core", "transformer_engine", "triton", "numpy", "transformers")
_AXES = ("world_size", "tensor", "pipeline", "context", "data", "expert", "expert_tensor")


def current_setting(config: Config, layout: Layout) -> Setting:
    """Return the setting of this job, on rank 0; elsewhere without the other ranks' devices. Collective: one gloo gather."""
    devices = Counter(str(name) for name in layout.gather_objects(_device_name(layout.device)))
    return Setting(
        layout={name: getattr(layout, name) for name in _AXES} | {"virtual": config.parallel.virtual_pipeline_parallel},
        versions={name: _version(name) for name in _PACKAGES}
        | {"python": platform.python_version(), "cuda": str(torch.version.cuda)},
        devices=dict(devices),
        flags={
            "deterministic": str(config.deterministic),
            "torch threads": str(torch.get_num_threads()),
            "float32 matmul": torch.get_float32_matmul_precision(),
            **{name: os.environ.get(name, "") for name in DETERMINISTIC},
        },
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
