"""A deterministic run: its switches, its errors, and its gradients on a CPU. Does not prove: that GPUs repeat bits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dapo_mcore.actor.parallel.determinism import make_deterministic
from dapo_mcore.errors import ConfigError
from dapo_mcore.process.environment import DETERMINISTIC
from dapo_mcore.train import job
from dapo_mcore.train.__main__ import main
from tests.actor import parity
from tests.actor.parity import Mesh, make_config


@pytest.fixture(autouse=True)
def everything_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in DETERMINISTIC:
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def test_a_run_switches_before_its_processes_connect(monkeypatch):
    def start(*_: Any) -> None:
        raise InterruptedError(f"{torch.are_deterministic_algorithms_enabled()} {os.environ.get('NCCL_ALGO')}")

    monkeypatch.setattr(job.layouts, "start", start)
    for deterministic, told in ((False, "False None"), (True, "True Ring")):
        with pytest.raises(InterruptedError, match=told):
            job.train(make_config(Mesh(), deterministic=deterministic))


def test_the_start_of_a_process_sets_the_environment_or_says_what_stands_against_it(
    tmp_path: Path, capsys, monkeypatch
):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: {path: none}\ndata: {files: [none]}\ndeterministic: true\nrollout: {max_response_tokens: 64}\n"
    )
    assert main([str(file)]) == 2
    assert {name: os.environ[name] for name in DETERMINISTIC} == {name: v[0] for name, v in DETERMINISTIC.items()}
    assert "none" in capsys.readouterr().err
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")
    assert main([str(file)]) == 2
    assert (
        "deterministic true needs NVTE_ALLOW_NONDETERMINISTIC_ALGO=0, but the environment has"
        in capsys.readouterr().err
    )


def test_what_comes_too_late_or_has_no_deterministic_kernel_is_refused(monkeypatch):
    config = make_config(Mesh(), deterministic=True)
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match=r"CUBLAS_WORKSPACE_CONFIG, NVTE_\w+ in the environment before CUDA starts"):
        make_deterministic(config)
    for name, values in DETERMINISTIC.items():
        monkeypatch.setenv(name, values[0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"rollout\.engine embedded.*set rollout\.engine sglang"):
        make_deterministic(config)
    assert not torch.are_deterministic_algorithms_enabled()
    make_deterministic(make_config(Mesh(), deterministic=True, rollout__engine="sglang"))
    assert torch.are_deterministic_algorithms_enabled()


def test_the_gradient_is_the_same_but_for_rounding(alone):
    found = []
    for deterministic in (False, True, True):
        config = make_config(Mesh(), deterministic=deterministic)
        make_deterministic(config)
        actor = parity.build_actor(config, alone)
        assert actor.policy.config.deterministic_mode is deterministic
        actor.update(parity.shared_step(config, alone, parity.make_batch(), actor)[0])
        found.append(torch.cat([weight.main_grad.flatten() for _, weight in actor.policy.named_weights()]))
    assert torch.equal(found[1], found[2]) and found[0].norm() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-8)
