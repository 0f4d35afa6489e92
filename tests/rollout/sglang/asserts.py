"""Assertions and waits that the tests of the SGLang engine share."""

from __future__ import annotations

import base64
import os
import signal

import numpy as np
import pytest
import torch

from dapo_mcore.errors import RolloutError
from dapo_mcore.rollout.sglang.engine import SGLangEngine
from dapo_mcore.rollout.sglang.sync.shared_bucket import SharedBucket
from dapo_mcore.types import Rollout
from tests.rollout.sglang.serving import (
    order,
    params,
    prompts,
    servers,
    shared_files,
    tiny_model,
    told,
    wait_for,
    weights,
)


def all_serve(made: SGLangEngine) -> None:
    """Wait until every server of the engine serves."""
    wait_for(lambda: len(made.pool.serving) == len(made.pool.servers), otherwise=made.pool.states.describe)


def assert_whole(rollouts: list[Rollout], asked: list[np.ndarray], length: int, version: int) -> None:
    """Assert that every prompt has its own whole response, made by the given weights alone."""
    assert len(rollouts) == len(asked)
    for rollout, prompt in zip(rollouts, asked):
        assert rollout.token_ids.tolist() == np.resize(prompt, length).tolist()
        assert rollout.weight_version == version and rollout.version_spans == () and rollout.finish_reason == "length"


def assert_survives_two_deaths(made: SGLangEngine) -> None:
    """Assert that answers are whole, and in the end all servers serve version 2, though fake servers die: one is killed after the
    first update, another dies in the second."""
    made.update_weights(weights(0), version=1)
    first, second = servers(made)[:2]
    asked = prompts(40)
    assert_whole(made.generate(asked, params(16)), asked, 16, version=1)
    os.kill(told(first)["pid"], signal.SIGKILL)
    assert_whole(made.generate(asked, params(16)), asked, 16, version=1)
    all_serve(made)
    order(second, "die", where="/update_weights_from_disk")
    made.update_weights(weights(1), version=2)
    assert_whole(made.generate(asked, params(16)), asked, 16, version=2)
    all_serve(made)
    assert made.metrics()["rollout/server_restarts"] == 2
    assert {told(server)["weight_version"] for server in servers(made)} == {made.pool.weight_version}


def alive(pid: int) -> bool:
    """Return True if the process runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def assert_an_error_where_memory_cannot_be_opened(made: SGLangEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assert the error of a server in another container: it does not find the memory by its name, and ends."""
    real, version = SharedBucket.handle, made.weight_version

    def elsewhere(self: SharedBucket, num_openers: int) -> str:
        return base64.b64encode(base64.b64decode(real(self, num_openers)).replace(b"/torch_", b"/other_")).decode()

    monkeypatch.setattr(SharedBucket, "handle", elsewhere)
    left = weights(0)
    with pytest.raises(RolloutError, match=r"none of 1 .*weight update, open: .*same user on the same machine"):
        made.update_weights(left, version=version + 1)
    assert list(left) == [] and made.weight_version == version and shared_files() == []


def mismatch(rollouts: list[Rollout], asked: list[np.ndarray], seed: int, temperature: float = 1.0) -> float:
    """Return the largest difference between the servers' log-probs of what the policy wrote and Hugging Face's in fp64."""
    return mismatch_with(tiny_model(seed), rollouts, asked, temperature)


def mismatch_with(
    model: torch.nn.Module, rollouts: list[Rollout], asked: list[np.ndarray], temperature: float = 1.0
) -> float:
    """Return the same for another model."""
    model, worst = model.double(), 0.0
    for prompt, rollout in zip(asked, rollouts, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, rollout.token_ids])).long()
        logits = model(ids[None]).logits[0, len(prompt) - 1 : -1] / temperature
        expected = logits.log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0]
        written = torch.from_numpy(rollout.loss_mask)
        worst = max(worst, (torch.from_numpy(rollout.logprobs) - expected)[written].abs().max().item())
    return worst


def assert_follows(made: SGLangEngine, seed: int, count: int = 16) -> None:
    """Assert that the servers generate with the weights of `seed`. Those of another seed would differ visibly."""
    asked = prompts(count)
    rollouts = made.generate(asked, params(24))
    assert mismatch(rollouts, asked, seed) <= 1e-5
    assert mismatch(rollouts, asked, seed + 1) > 0.1
    assert {rollout.weight_version for rollout in rollouts} == {made.weight_version}
