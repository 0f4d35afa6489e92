from __future__ import annotations

import torch

from dapo_mcore.replay.setting import current_setting
from tests.actor.parity import Mesh, make_config


def test_a_setting_names_layout_packages_devices_and_flags(alone):
    setting = current_setting(make_config(Mesh(), deterministic=True), alone)
    assert setting.layout["world_size"] == 1 and setting.layout["tensor"] == 1 and setting.layout["virtual"] == 1
    assert setting.versions["torch"] == torch.__version__.partition("+")[0] or "+" in torch.__version__
    assert setting.versions["megatron-core"] and setting.versions["triton"] is not None
    assert list(setting.devices.values()) == [1] and next(iter(setting.devices)).startswith("cpu")
    assert setting.flags["deterministic"] == "True"
    assert setting.flags["torch threads"] == str(torch.get_num_threads())
    assert "NCCL_ALGO" in setting.flags
