"""Parameters on one device and records on another: no call mixes them where CUDA would refuse, and no micro-batch waits for
the device. On a fake device.

Proves: that every Python-level call of the project has its tensors on one side. Does not prove: that CUDA computes right.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections import deque
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from tests.actor import parity
from tests.actor.fake_device import DEVICE, FakeDevice
from tests.actor.parity import Mesh

MODES = {
    "old log-probs of the actor": {"algo__old_logprobs": "actor"},
    "of the rollout engine": {},
    "right-padded": {"algo__old_logprobs": "actor", "batch__packing": False},
    "truncated importance sampling": {"algo__tis__mode": "truncate", "algo__old_logprobs": "actor"},
    "masked importance sampling": {"algo__tis__mode": "mask"},
    "KL in the loss": {"algo__kl__coef": 0.1, "algo__old_logprobs": "actor"},
    "KL in the reward": {"algo__kl__coef": 0.1, "algo__kl__place": "reward", "algo__old_logprobs": "actor"},
    "mismatch limit": {"algo__max_mismatch": 100.0},
    "entropy bonus": {"algo__entropy_coef": 0.01, "batch__head_eager_grad": False},
    "critic": {
        "algo__advantage": "gae",
        "algo__kl": {"coef": 0.1, "place": "reward"},
        "algo__old_logprobs": "actor",
        "model__dtype": "bf16",
    },
    "KL-Cov, response weights, rejection": {
        "algo__old_logprobs": "actor",
        "algo__policy_loss": "kl_cov",
        "algo__dual_clip": None,
        "algo__tis": {"mode": "truncate", "level": "sequence", "normalize": True},
        "algo__rejection": [{"level": "token", "upper": 1.2}, {"level": "geometric", "measure": "k3", "upper": 0.2}],
        "algo__adaptive_entropy": {"target": 5.0},
    },
    "Clip-Cov, token weights": {
        "algo__old_logprobs": "actor",
        "algo__policy_loss": "clip_cov",
        "algo__dual_clip": None,
        "algo__tis__mode": "truncate",
    },
    "bf16": {"model__dtype": "bf16", "algo__tis__mode": "mask", "algo__old_logprobs": "actor"},
}


ON_A_CPU_ONLY = {
    "__int__ in dapo_mcore.kernels.policy_loss.shard",
    "__bool__ in dapo_mcore.kernels.policy_head.main_grad",
}
"""Checks of values that ask for the tensors' real device first."""


def test_no_step_mixes_host_and_device(tmp_path):
    path = parity.save_problem(tmp_path / "problem.pt", parity.off_policy(parity.make_batch()))
    told = parity.spawn(run_all_modes, Mesh(), str(path))
    problems = [f"{name}: {problem}" for name, problem in told.items() if problem]
    assert not problems, "\n".join(problems)


def test_the_fake_device_refuses_what_cuda_refuses():
    with FakeDevice() as fake:
        there, here = torch.ones(3, device=DEVICE), torch.from_numpy(torch.ones(3).numpy())
        assert there.device == (there + 1).device == there[:2].device == here.to(DEVICE).device == DEVICE
        assert there.cpu().device == here.device == torch.device("cpu")
        assert float((there * 2).sum()) == 6.0 and torch.equal(there[here.long() - 1], there)
        for mix in (
            lambda: there - here,
            lambda: torch.stack([here, there]),
            lambda: here[there.long()],
            lambda: here.index_add_(0, there.long(), here),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                mix()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        fake.waits.clear()
        here.tolist(), here[here > 0], here.new_tensor(1), here.to(DEVICE, non_blocking=True), there.new_full((), 1)
        assert fake.waits == []
        there.tolist(), there[there > 0], there.new_tensor(1), here.to(DEVICE), there.cpu(), there.sum().item()
        torch.bincount(there.long()), torch.tensor([1], device=DEVICE)
        assert [wait.split()[0] for wait in fake.waits] == [
            *("tolist", "__getitem__", "new_tensor", "to", "cpu", "item", "bincount", "tensor"),
        ]
        there.copy_(here)
        assert there.to(DEVICE, torch.float64).device == there.to(torch.float64).device == DEVICE
        assert there.to(DEVICE, torch.float64).dtype == torch.float64


def run_all_modes(layout: Any, mesh: Mesh, path: str) -> dict[str, Any]:
    """Return, per mode, the traceback of an error, or None. Runs in a worker."""
    told: dict[str, Any] = {}
    for name, overrides in MODES.items():
        config = parity.make_config(mesh, **overrides)
        expected = run_all(config, layout, path, nullcontext()) if "truncated" in name else None
        try:
            found = run_on_device(FakeDevice(), config, layout, path)
            told[name] = None if expected in (None, found) else "the fake device has changed the result"
        except Exception:
            told[name] = traceback.format_exc()[-1500:]
    return told


def run_on_device(fake: FakeDevice, config: Any, layout: Any, path: str) -> list[float]:
    class There(type(layout)):
        """A layout on the device, whose control group takes tensors in host memory only, as its docstring says."""

        def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
            assert fake.side(values) != DEVICE
            return super().sum_over_ranks(values)

        def max_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
            assert fake.side(values) != DEVICE
            return super().max_over_ranks(values)

    fields = {field.name: getattr(layout, field.name) for field in dataclasses.fields(layout)}
    return run_all(config, There(**fields | {"device": DEVICE}), path, fake)


def run_all(config: Any, layout: Any, path: str, mode: Any) -> list[float]:
    """Score and update, and in one mode do all else that an actor can. Return the sums of the weights at the end."""
    from dapo_mcore.actor.covariance_selection import with_selection
    from dapo_mcore.actor.metrics import update_metrics

    batch, _ = parity.load_problem(path)
    with mode:
        actor = parity.build_actor(config, layout)
        if isinstance(mode, FakeDevice):
            adopt(mode, actor)
        (mini_batch,) = parity.scored_step(config, layout, batch, actor).mini_batches
        if config.algo.selects_by_covariance:
            mini_batch, _ = with_selection(mini_batch, actor.logprobs(mini_batch), 1, config.algo, layout)
        if isinstance(mode, FakeDevice):
            actor.score(mini_batch[:1])  # the first forward pass also moves the rotary frequencies
            mode.waits.clear()
            actor.score(mini_batch)
            actor.backward(mini_batch)
            if actor.critic is not None:
                actor.critic.score(mini_batch)
                actor.critic.backward(mini_batch)
            assert len(mini_batch) > 1 and set(mode.waits) <= ON_A_CPU_ONLY, set(mode.waits)
        update_metrics([actor.update(mini_batch)])
        if actor.critic is not None:
            actor.critic.update(mini_batch)
        assert all(weight.device == layout.device for weight in actor.policy.parameters())
        if config.algo.tis.mode == "truncate":
            go_on(actor, mini_batch)
        return [float(weight.double().sum()) for weight in actor.policy.parameters()]


def go_on(actor: Any, mini_batch: Any) -> None:
    """Take a supervised step, stream the weights, and move the memory to the host and back."""
    from dapo_mcore.actor.memory import ActorMemory
    from dapo_mcore.actor.weight_stream import WeightStream

    actor.update(mini_batch, supervised=True)
    memory, stream = ActorMemory(actor), WeightStream(actor.policy, actor.shape, actor.layout)
    memory.offload_state()
    deque(stream(), maxlen=0)
    memory.offload_weights()
    memory.onload()
    actor.update(mini_batch)


def adopt(fake: FakeDevice, actor: Any) -> None:
    """Treat Megatron's tensors as on the device. It allocates on `cuda`, which cpu_device.py makes the CPU."""
    for one in filter(None, (actor, actor.critic)):
        for buffer in parity.buffers(one):
            fake.adopt(tensor for tensor in (buffer.param_data, buffer.grad_data) if tensor is not None)
        fake.adopt(one.optimizer.tensors())
    for model in filter(None, (*actor.trained.values(), actor.reference)):
        fake.adopt((*model.parameters(), *model.buffers()))
