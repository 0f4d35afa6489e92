"""What megatron-core uses as its compiler."""

from __future__ import annotations

import sys

import pytest
import torch

from dapo_mcore.actor.parallel import megatron_jit


@pytest.mark.parametrize(("has_gpu", "expected"), [(False, "function"), (True, "compiled function")])
def test_megatron_compiles_with_a_gpu_only(monkeypatch, has_gpu, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch, "compile", lambda function: f"compiled {function}")
    monkeypatch.delitem(sys.modules, "megatron.core.jit", raising=False)
    megatron_jit.replace()
    from megatron.core.jit import jit_fuser

    assert jit_fuser("function") == expected


def test_a_module_that_is_imported_already_stays(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.core.jit", jit := object())
    megatron_jit.replace()
    assert sys.modules["megatron.core.jit"] is jit
