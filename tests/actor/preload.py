"""Imports for the process from which workers are forked: they cost more than the tests themselves."""

import transformers.models.qwen2.modeling_qwen2  # noqa: F401

from dapo_mcore.actor.parallel import cpu_device

cpu_device.install_if_needed()
