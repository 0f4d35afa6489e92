"""Optimizer state of experts that is saved on one mesh and loaded on others.

Optimizer state of dense models: tests/checkpoint/test_checkpoint.py.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dapo_mcore.errors import ConfigError
from tests.actor import families, parity
from tests.actor.cross_entropy import cross_entropy, micro_batch, own_batches
from tests.actor.parity import Mesh


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("experts")
    problem = families.save_problem("qwen2-moe", folder)
    # with distributed experts upstream chains two optimizers
    norms = parity.spawn(train, Mesh(data=2, expert=2), str(problem), str(folder), "save")
    return {"problem": str(problem), "folder": str(folder), "norms": norms}


@pytest.mark.parametrize(
    "mesh",
    [Mesh(tensor=2, sequence_parallel=True), Mesh(pipeline=2), Mesh(tensor=2, sequence_parallel=True, expert=2)],
    ids=str,
)
def test_experts_continue_on_another_mesh_with_their_moments(mesh, saved):
    continued = parity.spawn(train, mesh, saved["problem"], saved["folder"], "load")
    for expected, found in zip(saved["norms"], continued, strict=True):
        assert found == pytest.approx(expected[-2:], rel=1e-6)


def train(layout: Any, mesh: Mesh, problem: str, folder: str, action: str) -> list[list[float]]:
    """Return the gradient norms without and with the distributed optimizer. Runs in a worker.

    `save` takes four steps with a checkpoint in the middle; `load` takes the last two of them from that checkpoint.
    """
    return [train_one(layout, mesh, problem, Path(folder), action, distributed) for distributed in (False, True)]


def train_one(layout: Any, mesh: Mesh, path: str, folder: Path, action: str, distributed: bool) -> list[float]:
    from dapo_mcore.actor.actor import Actor
    from dapo_mcore.architecture.shape import weight_shape
    from dapo_mcore.checkpoint.checkpoint import load_checkpoint, save_checkpoint
    from dapo_mcore.checkpoint.run_state import TrainState
    from dapo_mcore.model_files.megatron_folder import MegatronReader

    problem, run_dir = families.load_problem(path), folder / f"distributed_{distributed}"
    config = parity.make_config(mesh, optimizer__distributed=distributed)
    reader = MegatronReader(problem.converted, weight_shape(problem.hf_config, layout.tensor))
    actor = Actor(config, problem.hf_config, layout, reader)
    norms = [] if action == "load" else [step(actor.ddp, actor.optimizer, problem, layout) for _ in range(2)]
    if action == "load":
        for parameter in actor.policy.parameters():
            parameter.data.zero_()
        load_checkpoint(run_dir / "checkpoints" / "step_000001", actor, layout)
    else:
        state = TrainState(1, 2, 1, loader={}, sampler={}, sampler_arrays={}, config="")
        save_checkpoint(run_dir, actor, state if layout.is_controller else None, layout, keep=1)
    return norms + [step(actor.ddp, actor.optimizer, problem, layout) for _ in range(2)]


def step(ddp: Any, optimizer: Any, problem: Any, layout: Any) -> float:
    from dapo_mcore.actor.forward_backward import run_micro_batches

    for chunk in ddp:
        chunk.zero_grad_buffer()
    optimizer.megatron.zero_grad()
    batches = [micro_batch(problem, batch, layout) for batch in own_batches(layout)]
    run_micro_batches(ddp, batches, partial(cross_entropy, layout=layout), layout, backward=True)
    norm = optimizer.prepare()
    optimizer.step(norm)
    return norm


MEMORY: dict[str, dict[str, Any]] = {
    "all on the host": {"optimizer__offload_fraction": 1.0},
    "half on the host, half fused": {"optimizer__offload_fraction": 0.5},
    "moments in bf16": {"optimizer__exp_avg_dtype": "bf16", "optimizer__exp_avg_sq_dtype": "bf16"},
    "one moment in bf16": {"optimizer__exp_avg_dtype": "bf16"},
}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, alone: Any) -> Any:
    from tests.actor import fake_engine

    fake_engine.pretend(monkeypatch)
    if "host" not in (name := request.node.callspec.params["name"]) or "fused" in name:
        fake_engine.use_fused_adam(monkeypatch)
    return alone


@pytest.mark.parametrize("name", MEMORY)
def test_state_that_saves_memory_resumes_bitwise_and_a_load_moves_no_weight(engine, name, tmp_path):
    from dapo_mcore.checkpoint.checkpoint import load_checkpoint
    from tests.checkpoint import resuming

    config = resuming.settings(Mesh(), model__dtype="bf16", **MEMORY[name])
    found = resuming.interrupt_and_resume(engine, Mesh(), str(tmp_path), MEMORY[name] | {"model__dtype": "bf16"}, False)
    assert found["moved"] and found["loaded"] and found["found"] == found["expected"] and found["different"] == []
    actor = resuming.build_actor(config, engine)
    load_checkpoint(Path(found["path"]), actor, engine)
    before = resuming.local_state(actor)
    take_a_step_at_rate_0(actor)
    after = resuming.local_state(actor)
    still = [key for key in before if key.startswith(("policy.", "master"))]
    assert len(still) > 50 and all(torch.equal(before[key], after[key]) for key in still)


@pytest.mark.parametrize("name", MEMORY)
def test_a_skipped_step_leaves_state_that_saves_memory_as_it_is(engine, name):
    from tests.checkpoint import resuming

    actor = resuming.build_actor(resuming.settings(Mesh(), model__dtype="bf16", **MEMORY[name]), engine)
    resuming.train(actor, 2)
    before, lr = resuming.local_state(actor), actor.optimizer.lr
    (mini_batch, *_) = parity.shared_step(actor.config, engine, parity.make_batch(), actor)
    for factor in (float("nan"), float("inf")):
        spoiled = [micro.with_(token_weights=micro.token_weights * factor) for micro in mini_batch]
        assert actor.update(spoiled).skipped
        assert resuming.differences(engine, before, resuming.local_state(actor)) == []
    assert actor.optimizer.lr == lr and not actor.update(mini_batch).skipped and actor.optimizer.lr > lr


@pytest.mark.parametrize("name", MEMORY)
def test_state_that_saves_memory_trains_like_other_state(engine, name):
    from tests.actor.fake_engine import HostTensor
    from tests.checkpoint import resuming

    actors = {}
    for way, options in (("plain", {}), ("memory", MEMORY[name])):
        with pytest.MonkeyPatch.context() as patch:
            if way == "plain":
                patch.setattr("megatron.core.optimizer.USING_PYTORCH_OPTIMIZER", True)
            options = options | {"model__dtype": "bf16", "optimizer__clip_grad": 0.01}
            actors[way] = resuming.build_actor(resuming.settings(Mesh(), **options), engine)
        resuming.train(actors[way], 3)
    states = {way: list(actor.optimizer.shards()) for way, actor in actors.items()}
    for plain, memory in zip(states["plain"], states["memory"], strict=True):
        assert memory.state.keys() == plain.state.keys() == {"exp_avg", "exp_avg_sq", "param"}
        moved = (memory.state["param"] - plain.state["param"]).norm()
        assert moved <= 6e-5 * plain.state["param"].numel() ** 0.5, "a tenth of the three steps' learning rates"
        for name in ("exp_avg", "exp_avg_sq"):
            difference = (memory.state[name].float() - plain.state[name]).norm()
            assert difference <= 0.05 * plain.state[name].norm(), name
    dtypes = {key: tensor.dtype for key, tensor in states["memory"][0].state.items()}
    expected = {"exp_avg": actors["memory"].config.optimizer.exp_avg_dtype, "param": "fp32"}
    assert all(
        str(dtypes[key]) == {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[kind] for key, kind in expected.items()
    )
    fraction = actors["memory"].config.optimizer.offload_fraction
    on_host = [
        shard.state["exp_avg"].numel() for shard in states["memory"] if isinstance(shard.state["exp_avg"], HostTensor)
    ]
    assert sum(on_host) >= fraction * sum(shard.state["exp_avg"].numel() for shard in states["memory"])
    assert bool(on_host) == bool(fraction) and (len(on_host) < len(states["memory"])) == (fraction < 1)


def take_a_step_at_rate_0(actor: Any) -> None:
    (mini_batch,) = parity.shared_step(actor.config, actor.layout, parity.make_batch(), actor)
    actor.backward(mini_batch)
    norm = actor.optimizer.prepare()
    for group in actor.optimizer.megatron.param_groups:
        group["lr"] = 0.0
    actor.optimizer.step(norm)


@pytest.mark.parametrize("name", ["all on the host", "moments in bf16"])
def test_a_gradient_that_is_not_finite_is_found_in_decoupled_gradients(engine, name):
    from tests.checkpoint import resuming

    actor = resuming.build_actor(resuming.settings(Mesh(), model__dtype="bf16", **MEMORY[name]), engine)
    (mini_batch,) = parity.shared_step(actor.config, engine, parity.make_batch(), actor)
    actor.backward(mini_batch)
    actor.policy[0].decoder.final_layernorm.weight.main_grad[0] = float("nan")
    actor.optimizer.megatron.prepare_grads()
    assert not actor.optimizer._copies_are_finite()


def test_state_on_the_host_or_in_bf16_is_refused_without_a_gpu(alone):
    with pytest.raises(
        ConfigError, match="moments in bf16 need a CUDA device and Transformer Engine's FusedAdam; install"
    ):
        parity.build_actor(parity.make_config(Mesh(), model__dtype="bf16", optimizer__offload_fraction=1.0), alone)


class Passes(TorchDispatchMode):
    """Counts how often operations read or write all elements of a buffer."""

    def __init__(self, buffer: torch.Tensor):
        super().__init__()
        self.buffer, self.count = buffer, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            storage = self.buffer.untyped_storage().data_ptr()
            own = [tensor for tensor in tensors if tensor.untyped_storage().data_ptr() == storage]
            self.count += sum(tensor.numel() for tensor in own) / self.buffer.numel()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("clip", "clipping"), [(0.0, 0), (1000.0, 0), (1e-3, 2)])
def test_gradients_are_read_once_for_norm_and_check_and_scaled_only_if_clipped(alone, clip, clipping):
    """Two passes scale: a read and a write. Adam's own are not counted."""
    actor = parity.build_actor(parity.make_config(Mesh(), optimizer__clip_grad=clip), alone)
    (mini_batch,) = parity.shared_step(actor.config, alone, parity.make_batch(), actor)
    actor.backward(mini_batch)
    (buffer,) = parity.buffers(actor)
    with Passes(buffer.grad_data) as prepared:
        norm = actor.optimizer.prepare()
    actor.optimizer.megatron.step_with_ready_grads = lambda: True
    with Passes(buffer.grad_data) as clipped:
        actor.optimizer.step(norm)
    assert 1e-3 < norm < 1000
    assert prepared.count == pytest.approx(1, abs=0.01), "norms and other unsplit parameters are checked once more"
    assert clipped.count == pytest.approx(clipping, abs=0.01)
