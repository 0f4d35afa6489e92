"""A resumed run is the uninterrupted one: bit for bit on the same mesh, to 1e-6 on another.

The workers run in real gloo processes; each spawn checks several things, because starting it is what costs time.
"""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dapo_mcore.errors import CheckpointError
from dapo_mcore.weights.checkpoint import load_checkpoint, save_checkpoint
from dapo_mcore.weights.checkpoint_folder import latest_checkpoint
from dapo_mcore.weights.hf_io import RandomReader
from dapo_mcore.weights.run_state import TrainState
from tests.actor.parity import Mesh, gather_named, hf_config, make_batch, make_config, shared_step, spawn

STATE = TrainState(
    step=2,
    num_updates=2,
    weight_version=3,
    loader={"epoch": 1, "offset": 7},
    sampler={"groups": [{"uid": "train:4", "samples": [{"text": "Ünïcode"}]}]},
    sampler_arrays={
        "token_ids": np.arange(5, dtype=np.int32),
        "logprobs": np.array([-0.1, np.nan], dtype=np.float32),
        "loss_mask": np.array([True, False]),
        "offsets": np.zeros(0, dtype=np.int64),
    },
    config="name: run\n",
)


def build_actor(config: Any, layout: Any, family: str = "qwen2", tied: bool = False) -> Any:
    """A fresh actor. 65 words are padded to 80 on two tensor-parallel ranks, to 72 on one."""
    from dapo_mcore.actor.actor import Actor

    model = hf_config(family, tied)
    model.vocab_size = 65
    return Actor(config, model, layout, RandomReader(model, seed=0))


def train(actor: Any, num_updates: int) -> list[float]:
    """Gradient norms and learning rates of some gradient steps."""
    mini_batches = shared_step(actor.config, actor.layout, make_batch(), actor)
    updates = [actor.update(mini_batches[0]) for _ in range(num_updates)]
    return [value for update in updates for value in (update.grad_norm, update.lr)]


def local_state(actor: Any) -> dict[str, torch.Tensor]:
    """Every tensor of this rank that training changes."""
    found = {f"policy.{name}": p.detach() for name, p in actor.policy.named_parameters()}
    for part in actor.optimizer.megatron.chained_optimizers:
        parameters = [p for group in part.optimizer.param_groups for p in group["params"]]
        for index, parameter in enumerate(parameters):
            found[f"master.{index}"] = parameter.detach()
            found |= {f"{key}.{index}": value for key, value in part.optimizer.state[parameter].items()}
    return {name: tensor.clone() for name, tensor in found.items()}


def differences(layout: Any, ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not bitwise equal, over all ranks."""
    assert ours.keys() == theirs.keys() and any(name.startswith("exp_avg_sq") for name in ours)
    here = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    found: list[Any] = [None] * layout.world_size
    torch.distributed.all_gather_object(found, here, group=layout.control_group)
    return [f"rank {rank}: {name}" for rank, names in enumerate(found) for name in names]


def settings(mesh: Mesh, **overrides: Any) -> Any:
    """A warm-up longer than the run: every step has its own learning rate."""
    return make_config(mesh, optimizer__warmup_updates=8, **overrides)


def interrupt_and_resume(layout: Any, mesh: Mesh, folder: str, options: dict[str, Any], tied: bool) -> dict[str, Any]:
    """Two steps, a checkpoint, two steps; then the same last two steps by a fresh actor that loads the checkpoint."""
    config = settings(mesh, **options)
    actor = build_actor(config, layout, tied=tied)
    train(actor, 2)
    actor.freeze_reference()  # a reference that only the checkpoint knows
    path = save_checkpoint(Path(folder), actor, STATE if layout.is_controller else None, layout, keep=2)
    saved = {name: p.detach().clone() for name, p in actor.policy.named_parameters()}
    expected = train(actor, 2)
    resumed = build_actor(config, layout, tied=tied)
    state = load_checkpoint(path, resumed, layout)
    loaded = {name: p.detach().clone() for name, p in resumed.policy.named_parameters()}
    found = train(resumed, 2)
    weights = gather_named(resumed, dict(resumed.policy.named_parameters()))
    if layout.is_controller:
        np.savez(
            Path(folder) / "after.npz", trace=found, **{name: t.detach().float().numpy() for name, t in weights.items()}
        )
    return {
        "moved": any(not torch.equal(saved[name], p) for name, p in actor.policy.named_parameters()),
        "loaded": all(torch.equal(saved[name], loaded[name]) for name in saved),
        "expected": expected,
        "found": found,
        "different": differences(layout, local_state(actor), local_state(resumed)),
        "updates": resumed.num_updates,
        "state": [state.step, state.weight_version, state.loader, state.sampler, state.config],
        "arrays": {name: [str(a.dtype), a.tobytes().hex()] for name, a in state.sampler_arrays.items()},
        "path": str(path),
    }


def check_resumed(result: dict[str, Any]) -> None:
    assert result["moved"] and result["loaded"]
    assert result["found"] == result["expected"]
    assert result["found"][1::2] == pytest.approx([1e-3 * 3 / 8, 1e-3 * 4 / 8], rel=1e-12)
    assert result["different"] == []
    assert result["updates"] == 4
    assert result["state"] == [STATE.step, STATE.weight_version, STATE.loader, STATE.sampler, STATE.config]
    assert result["arrays"] == {n: [str(a.dtype), a.tobytes().hex()] for n, a in STATE.sampler_arrays.items()}


@pytest.fixture(scope="module")
def tensor_parallel_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tensor_parallel")
    return spawn(interrupt_and_resume, Mesh(tensor=2), str(folder), {}, False)


def test_resume_is_bitwise_with_tensor_parallelism(tensor_parallel_run: dict[str, Any]) -> None:
    check_resumed(tensor_parallel_run)


def test_resume_is_bitwise_in_bf16_with_a_sharded_optimizer_and_a_reference_policy(tmp_path: Path) -> None:
    options = {"model__dtype": "bf16", "algo__kl__coef": 0.1}
    check_resumed(spawn(interrupt_and_resume, Mesh(data=2), str(tmp_path), options, False))


def test_resume_is_bitwise_with_tied_embeddings_on_two_pipeline_stages(tmp_path: Path) -> None:
    check_resumed(spawn(interrupt_and_resume, Mesh(pipeline=2), str(tmp_path), {}, True))


def in_one_process(layout: Any, mesh: Mesh, folder: str, tensor_parallel_path: str) -> dict[str, Any]:
    """All that needs an actor but no mesh; the plain optimizer, and a checkpoint that two tensor-parallel ranks wrote."""
    base = Path(folder)
    return {
        "plain": interrupt_and_resume(layout, mesh, folder, {"optimizer__distributed": False}, False),
        "reshard": reshard(layout, mesh, Path(tensor_parallel_path)),
        "first_step": [before_the_first_step(layout, mesh, base / str(own), own) for own in (True, False)],
        "settings": changed_settings(layout, mesh, Path(tensor_parallel_path)),
        "helpers": [process.name for process in multiprocessing.active_children()],
        "kept": retention(layout, mesh, base / "retention"),
        "errors": errors(layout, mesh, Path(tensor_parallel_path), base),
    }


def reshard(layout: Any, mesh: Mesh, path: Path) -> dict[str, Any]:
    actor = build_actor(settings(mesh), layout)
    load_checkpoint(path, actor, layout)
    trace = train(actor, 2)
    weights = gather_named(actor, dict(actor.policy.named_parameters()))
    after = np.load(path.parents[1] / "after.npz")
    worst = max(np.abs(weights[name].detach().numpy() - after[name]).max() for name in weights)
    return {"trace": trace, "expected": after["trace"].tolist(), "worst": float(worst), "tensors": len(weights)}


def before_the_first_step(layout: Any, mesh: Mesh, folder: Path, distributed: bool) -> dict[str, Any]:
    """Saving before any gradient step neither disturbs the run nor loses anything."""
    config = settings(mesh, optimizer__distributed=distributed)
    undisturbed, saved, resumed = (build_actor(config, layout) for _ in range(3))
    path = save_checkpoint(folder, saved, replace(STATE, step=0, num_updates=0), layout, keep=1)
    load_checkpoint(path, resumed, layout)
    expected = train(undisturbed, 2)
    return {
        "expected": expected,
        "saved": train(saved, 2),
        "resumed": train(resumed, 2),
        "different": differences(layout, local_state(undisturbed), local_state(resumed)),
    }


def changed_settings(layout: Any, mesh: Mesh, path: Path) -> list[float]:
    """Learning rate and weight decay after a resume with other settings than the checkpoint's."""
    actor = build_actor(settings(mesh, optimizer__lr=5e-4, optimizer__weight_decay=0.25), layout)
    load_checkpoint(path, actor, layout)
    train(actor, 1)
    return [actor.optimizer.lr, max(group["weight_decay"] for group in actor.optimizer.megatron.param_groups)]


def retention(layout: Any, mesh: Mesh, folder: Path) -> list[Any]:
    """Folders after each of four saves with keep=2, the third of a step that exists; leftovers stay out of it."""
    actor = build_actor(settings(mesh), layout)
    (folder / "checkpoints" / "step_000004.partial" / "megatron").mkdir(parents=True)
    (folder / "checkpoints" / "step_000004.partial" / "junk").write_text("left by a killed run")
    (folder / "checkpoints" / "step_000099.partial").mkdir()
    seen: list[Any] = []
    for step in (2, 4, 4, 1_000_000):
        path = save_checkpoint(folder, actor, replace(STATE, step=step), layout, keep=2)
        seen.append(sorted(p.name for p in path.parent.iterdir()))
    return [*seen, sorted(p.name for p in path.iterdir()), latest_checkpoint(folder).name]


def errors(layout: Any, mesh: Mesh, good: Path, folder: Path) -> dict[str, str]:
    import shutil

    actor = build_actor(settings(mesh), layout)

    def message(path: Path, actor: Any) -> str:
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path, actor, layout)
        return str(caught.value)

    def damaged(name: str, act: Any) -> str:
        copy = folder / name / "step_000002"
        shutil.copytree(good, copy)
        act(copy)
        return message(copy, actor)

    with_reference = build_actor(settings(mesh, algo__kl__coef=0.1), layout)
    return {
        "absent": message(folder / "checkpoints" / "step_000077", actor),
        "no_json": damaged("no_json", lambda p: (p / "state.json").unlink()),
        "broken_json": damaged("broken_json", lambda p: (p / "state.json").write_text('{"train": ')),
        "broken_arrays": damaged("broken_arrays", lambda p: (p / "state.safetensors").write_bytes(b"\1")),
        "no_shard": damaged("no_shard", lambda p: next((p / "megatron").glob("*.distcp")).unlink()),
        "untied": message(good, build_actor(settings(mesh), layout, family="llama", tied=True)),
        "reference": message(good, with_reference),
    }


@pytest.fixture(scope="module")
def single_process_run(tensor_parallel_run: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return spawn(in_one_process, Mesh(), str(tmp_path_factory.mktemp("single")), tensor_parallel_run["path"])


def test_resume_is_bitwise_with_the_plain_optimizer(single_process_run: dict[str, Any]) -> None:
    check_resumed(single_process_run["plain"])


def test_a_tensor_parallel_checkpoint_continues_in_one_process(single_process_run: dict[str, Any]) -> None:
    found = single_process_run["reshard"]
    assert found["trace"] == pytest.approx(found["expected"], rel=1e-6)
    assert found["worst"] < 1e-6
    assert found["tensors"] == 4 * 12 + 3


def test_a_checkpoint_before_the_first_gradient_step(single_process_run: dict[str, Any]) -> None:
    for found in single_process_run["first_step"]:
        assert found["saved"] == found["resumed"] == found["expected"]
        assert found["different"] == []


def test_saving_leaves_no_process_behind(single_process_run: dict[str, Any]) -> None:
    assert single_process_run["helpers"] == []


def test_the_configuration_decides_rates_and_the_checkpoint_the_position(single_process_run: dict[str, Any]) -> None:
    assert single_process_run["settings"] == pytest.approx([5e-4 * 3 / 8, 0.25], rel=1e-12)


def test_the_newest_checkpoints_are_kept_and_unfinished_ones_ignored(single_process_run: dict[str, Any]) -> None:
    unfinished = "step_000099.partial"
    assert single_process_run["kept"] == [
        ["step_000002", "step_000004.partial", unfinished],
        ["step_000002", "step_000004", unfinished],
        ["step_000002", "step_000004", unfinished],
        ["step_000004", unfinished, "step_1000000"],
        ["config.json", "megatron", "state.json", "state.safetensors"],
        "step_1000000",
    ]


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("absent", ["no checkpoint at", "step_000077"]),
        ("no_json", ["not a whole checkpoint", "lacks state.json"]),
        ("broken_json", ["state.json is damaged", "to start anew: no older one is beside it"]),
        ("broken_arrays", ["state.safetensors is truncated or damaged"]),
        ("no_shard", [".distcp is missing", "delete"]),
        (
            "untied",
            [
                "tied is False there and True here",
                "architecture is 'Qwen2ForCausalLM' there and 'LlamaForCausalLM' here",
            ],
        ),
        ("reference", ["holds no reference policy", "algo.kl.coef is 0.1"]),
    ],
)
def test_errors_say_what_is_wrong(single_process_run: dict[str, Any], case: str, parts: list[str]) -> None:
    assert all(part in single_process_run["errors"][case] for part in parts), single_process_run["errors"][case]


def test_no_checkpoint_in_a_new_or_unfinished_run(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints" / "step_000003.partial").mkdir(parents=True)
    assert latest_checkpoint(tmp_path) is None


def test_the_state_file_is_readable_json(tensor_parallel_run: dict[str, Any]) -> None:
    stored = json.loads((Path(tensor_parallel_run["path"]) / "state.json").read_text())
    assert stored["train"]["loader"] == STATE.loader
    assert stored["fits"]["hidden_size"] == 64
