"""Converted checkpoints have megatron-core's format: its models load them in any layout, and we read what they save.

The workers run in real gloo processes, one start for all families of a mesh.
"""

from __future__ import annotations

import dataclasses
import queue
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from dapo_mcore.architecture.mapping import checkpoint_slice, find_parameter, import_parameter, local_shape, parameters
from dapo_mcore.architecture.shape import WeightShape, weight_shape
from dapo_mcore.config.model import ModelConfig
from dapo_mcore.convert.convert import Cut, hf_to_mcore
from dapo_mcore.convert.job import NoReport
from dapo_mcore.errors import CheckpointError
from dapo_mcore.model_files.hf_config import load_hf_config
from dapo_mcore.model_files.hf_folder import SafetensorsReader
from dapo_mcore.model_files.megatron_folder import MEGATRON, MegatronReader, is_megatron_folder
from tests.actor.parity import Mesh, build_actor, hf_config, make_config, spawn, start_weights
from tests.model_files.zoo import CONFIGS, MOE, config_of

Folders = Callable[..., Path]

DENSE = [family for family in CONFIGS if family not in MOE]
DENSE_MESHES = [Mesh(), Mesh(tensor=2), Mesh(pipeline=2), Mesh(tensor=2, pipeline=2)]
MOE_MESHES = [
    Mesh(data=2, expert=2),
    Mesh(tensor=2, sequence_parallel=True),
    Mesh(tensor=2, sequence_parallel=True, expert=2),
    Mesh(pipeline=2, data=2, expert=2),
]
CASES = [(mesh, DENSE) for mesh in DENSE_MESHES] + [(mesh, list(MOE)) for mesh in MOE_MESHES]


def load_and_save(layout: Any, mesh: Mesh, families: dict[str, list[str]]) -> dict[str, Any]:
    """Return the differences for each family's (HF folder, converted folder, folder to save to), over all ranks."""
    return {family: load_and_save_one(layout, mesh, *map(Path, paths)) for family, paths in families.items()}


def load_and_save_one(layout: Any, mesh: Mesh, hf: Path, mcore: Path, out: Path) -> dict[str, Any]:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    hf_config = load_hf_config(ModelConfig(path=str(hf)))
    shape = weight_shape(hf_config, layout.tensor)
    direct, loaded = new_policy(mesh, hf_config, layout), new_policy(mesh, hf_config, layout)
    direct.load_weights(SafetensorsReader(hf), shape, layout)
    with torch.no_grad():
        for _, weight in loaded.named_weights():
            weight.fill_(torch.nan)
    tensors = dist_checkpointing.load(sharded_tensors(loaded[0]), str(mcore / MEGATRON))
    _, unexpected = loaded[0].load_state_dict(tensors, strict=False)
    if layout.is_controller:
        (out / MEGATRON).mkdir(parents=True)
        shutil.copyfile(hf / "config.json", out / "config.json")
    dist.barrier()
    # saves each rank the helper process that would hold the queue of an asynchronous save
    filesystem_async._results_queue = filesystem_async._results_queue or queue.Queue()
    dist_checkpointing.save({"policy": direct[0].sharded_state_dict()}, str(out / MEGATRON))
    found = {
        "different": [*different(direct, loaded, shape, layout), *unexpected],
        "places": places(sharded_tensors(loaded[0])),
    }
    everyone: list[Any] = [None] * layout.world_size
    dist.all_gather_object(everyone, found, group=layout.control_group)
    return {
        "different": [f"rank {rank}: {name}" for rank, own in enumerate(everyone) for name in own["different"]],
        "places": {key: size for own in everyone for key, size in own["places"].items()},
    }


def new_policy(mesh: Mesh, hf_config: Any, layout: Any) -> Any:
    from dapo_mcore.actor.model.policy import build_policy

    return build_policy(make_config(mesh), hf_config, layout)


def sharded_tensors(model: Any) -> dict[str, Any]:
    """The model's tensors as megatron-core's checkpoints see them; Transformer Engine's extra states are in no HF folder."""
    return {name: entry for name, entry in model.sharded_state_dict().items() if "_extra_state" not in name}


def places(state: dict[str, Any]) -> dict[str, list[int]]:
    """Return each whole tensor's shape by its key. Megatron makes the halves of gate and up by factories."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    apply_factories(state)
    return {tensor.key: list(tensor.global_shape) for tensor in nested_values(state)}


def different(direct: Any, loaded: Any, shape: WeightShape, layout: Any) -> list[str]:
    """Return the names of local weights whose bits differ. Rows of the vocabulary's padding are left out."""
    theirs, found = dict(loaded.named_weights()), []
    for name, ours in direct.named_weights():
        rows = ours.shape[0]
        if find_parameter(name, shape).rule.is_vocab:
            rows = max(0, min(rows, shape.vocab_size - layout.tensor_rank * rows))
        if not torch.equal(ours[:rows], theirs[name][:rows]):
            found.append(name)
    return found


def expected_places(hf: Path) -> dict[str, list[int]]:
    """Return each whole tensor's shape by its checkpoint key, with layers and experts as leading axes."""
    shape = weight_shape(load_hf_config(ModelConfig(path=str(hf))), 1)
    places = [(parameter, checkpoint_slice(parameter, shape)) for parameter in parameters(shape)]
    return {place.key: [*place.size, *local_shape(parameter, shape)] for parameter, place in places}


def without_padding(places: dict[str, list[int]]) -> dict[str, list[int]]:
    """Remove the padded vocabulary's size, which depends on the mesh."""
    vocab = ("embedding.word_embeddings.weight", "output_layer.weight")
    return {key: size[1:] if key in vocab else size for key, size in places.items()}


@pytest.mark.parametrize(("mesh", "families"), CASES, ids=lambda value: str(value) if isinstance(value, Mesh) else "")
def test_policies_load_converted_checkpoints_and_their_own_read_back(
    mesh: Mesh, families: list[str], tmp_path: Path, hf_folder: Folders
) -> None:
    """Chunks were made for this mesh and for others. Two stages share three layers."""
    work: dict[str, list[str]] = {}
    for number, family in enumerate(families):
        hf, mcore = hf_folder(family), tmp_path / f"{family}-mcore"
        cut = Cut(*((1, 1), (2, 2), (4, 1))[number % 3], 2 if family in MOE else 1)
        hf_to_mcore(hf, mcore, cut, NoReport())
        work[family] = [str(hf), str(mcore), str(tmp_path / f"{family}-saved")]
    result = spawn(load_and_save, mesh, work)
    for family, (hf, _, saved) in work.items():
        assert result[family]["different"] == [], family
        assert without_padding(result[family]["places"]) == without_padding(expected_places(Path(hf))), family
        assert is_megatron_folder(Path(saved))
        assert_reads_back(Path(saved), Path(hf))


def assert_reads_back(saved: Path, hf: Path) -> None:
    reader = MegatronReader(saved, weight_shape(load_hf_config(ModelConfig(path=str(saved))), 1))
    expected = load_file(hf / "model.safetensors")
    assert set(reader.names) == set(expected)
    assert [name for name, tensor in expected.items() if not torch.equal(reader.read(name), tensor)] == []


def save_run(layout: Any, mesh: Mesh, run_dir: str) -> str:
    """Worker: save a checkpoint of policy and optimizer before any step, and return its folder."""
    from dapo_mcore.checkpoint.checkpoint import save_checkpoint
    from dapo_mcore.checkpoint.run_state import TrainState

    actor = build_actor(make_config(mesh), layout, "qwen3")
    state = TrainState(1, 1, 1, loader={}, sampler={}, sampler_arrays={}, config="")
    return str(save_checkpoint(Path(run_dir), actor, state if layout.is_controller else None, layout, keep=1))


def test_a_training_checkpoint_reads_back(tmp_path: Path) -> None:
    """The checkpoint also holds the optimizer's tensors, which the reader ignores."""
    folder = Path(spawn(save_run, Mesh(tensor=2, pipeline=2), str(tmp_path)))
    reader = MegatronReader(folder, weight_shape(hf_config("qwen3"), 1))
    assert any(key.startswith("optimizer") for key in reader.store.tensors)
    expected = start_weights("qwen3", tied=False)
    assert set(reader.names) == set(expected)
    assert [name for name, tensor in expected.items() if not torch.equal(reader.read(name), tensor)] == []


@pytest.mark.parametrize("family", ["qwen2", "qwen3-moe", "qwen2-moe-mixed"])
def test_every_slice_of_every_tensor_is_read(family: str, tmp_path: Path, hf_folder: Folders) -> None:
    hf, shape = hf_folder(family), weight_shape(config_of(family), 4)
    hf_to_mcore(hf, tmp_path / "mcore", Cut(4, 2, 2 if family in MOE else 1), NoReport())
    reader, expected = MegatronReader(tmp_path / "mcore", shape), load_file(hf / "model.safetensors")
    for name, tensor in expected.items():
        assert (reader.shape(name), reader.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(reader.read(name), tensor)
        for dim, size in enumerate(tensor.shape):
            for start, stop in ((0, 0), (0, size), (size // 3, size - 1), (size - 1, size)):
                found = reader.read(name, dim, start, stop)
                assert torch.equal(found, tensor.narrow(dim, start, stop - start)), (name, dim, start, stop)


def test_in_the_layout_of_the_checkpoint_a_rank_reads_only_its_own_bytes(
    tmp_path: Path, hf_folder: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_to_mcore(hf_folder("qwen2-moe"), tmp_path / "mcore", Cut(2, 1, 1, 2), NoReport())
    shape = weight_shape(config_of("qwen2-moe"), 2)
    reader, read = MegatronReader(tmp_path / "mcore", shape), []
    original = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: read.append(original(*args, **options)) or read[-1])
    for parameter in parameters(shape):
        value = import_parameter(parameter, reader, shape, 1, 2)
        assert sum(chunk.nbytes for chunk in read) == value.nbytes, parameter.names
        read.clear()


def test_a_config_that_disagrees_with_the_checkpoint_is_refused(tmp_path: Path, hf_folder: Folders) -> None:
    hf_to_mcore(hf_folder("qwen2"), tmp_path / "mcore", Cut(), NoReport())
    shape = weight_shape(config_of("qwen2"), 1)
    reader = MegatronReader(tmp_path / "mcore", shape)
    with pytest.raises(CheckpointError, match=r"has no tensor model\.layers\.3\.mlp"):
        reader.read("model.layers.3.mlp.up_proj.weight")
    changes: list[tuple[dict[str, Any], str]] = [
        ({"ffn_size": 40}, r"linear_fc1\.weight is \[3, 96, 32\], but config\.json implies \[3, 80, 32\]"),
        ({"num_layers": 2, "moe_layers": (False,) * 2}, r"is \[3, 32\], but config\.json implies \[2, 32\]"),
        ({"vocab_size": 105}, r"word_embeddings\.weight is \[104, 32\], but config\.json implies \[105, 32\]"),
        ({"architecture": "Qwen3ForCausalLM"}, r"has no tensor decoder\.layers\.self_attention\.q_layernorm\.weight"),
    ]
    for change, told in changes:
        with pytest.raises(CheckpointError, match=told):
            MegatronReader(tmp_path / "mcore", dataclasses.replace(shape, **change))


def test_a_megatron_folder_is_recognized(tmp_path: Path, hf_folder: Folders) -> None:
    hf_to_mcore(hf_folder("qwen2"), tmp_path / "mcore", Cut(), NoReport())
    assert is_megatron_folder(tmp_path / "mcore")
    assert not is_megatron_folder(hf_folder("qwen2")) and not is_megatron_folder(tmp_path / "absent")
