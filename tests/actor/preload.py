"""Imported once by the server that worker processes are forked from: the imports cost more than the tests."""

import transformers.models.qwen2.modeling_qwen2  # noqa: F401

from dapo_mcore.actor.parallel import cpu_device

cpu_device.install_if_needed()
