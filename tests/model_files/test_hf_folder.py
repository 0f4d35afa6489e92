"""Model folders: read slice by slice, with errors that name the file, and written completely or not at all."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from dapo_mcore.architecture.mapping import parameters
from dapo_mcore.architecture.shape import weight_shape
from dapo_mcore.config.model import ModelConfig
from dapo_mcore.convert.convert import Cut, hf_to_mcore
from dapo_mcore.convert.job import NoReport
from dapo_mcore.errors import CheckpointError
from dapo_mcore.model_files.hf_folder import (
    RandomReader,
    SafetensorsReader,
    exported_step,
    open_weights,
    plan_files,
    save_hf_folder,
    tensor_groups,
    write_index,
)
from dapo_mcore.model_files.megatron_folder import MegatronReader
from dapo_mcore.model_files.safetensors_file import TensorInfo
from tests.actor.parity import hf_config
from tests.model_files.zoo import config_of

MATRIX = torch.arange(12, dtype=torch.float32).view(4, 3)
INDEX = "model.safetensors.index.json"


def sharded_folder(folder: Path) -> Path:
    """`a` and `b` in one shard, `c` in another."""
    save_file({"a": MATRIX, "b": torch.tensor([1.0, 2.0])}, folder / "one.safetensors")
    save_file({"c": MATRIX.to(torch.bfloat16)}, folder / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_slices_of_a_single_file_are_read(tmp_path: Path) -> None:
    save_file({"a": MATRIX, "b": torch.tensor([1.0, 2.0])}, tmp_path / "model.safetensors")
    reader = SafetensorsReader(tmp_path)
    assert reader.shape("a") == (4, 3) and reader.shape("b") == (2,)
    assert torch.equal(reader.read("a"), MATRIX)
    assert reader.read("b").tolist() == [1, 2]
    assert reader.read("a", 0, 1, 3).tolist() == [[3, 4, 5], [6, 7, 8]]
    assert reader.read("a", 1, 2, 3).tolist() == [[2], [5], [8], [11]]
    assert reader.read("a", 0, 4, 4).shape == (0, 3)


def test_an_index_leads_to_the_shards(tmp_path: Path) -> None:
    reader = SafetensorsReader(sharded_folder(tmp_path))
    assert (sorted(reader.names), [path.name for path in reader.paths]) == (
        ["a", "b", "c"], ["one.safetensors", "two.safetensors"],
    )  # fmt: skip
    assert torch.equal(reader.read("a"), MATRIX)
    assert reader.read("c", 1, 0, 1).tolist() == [[0], [3], [6], [9]]
    assert reader.dtype("c") == reader.read("c").dtype == torch.bfloat16


def test_errors_name_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor .* set model\.init random"):
        SafetensorsReader(tmp_path)
    reader = SafetensorsReader(sharded_folder(tmp_path))
    for ask in (reader.read, reader.shape, reader.dtype):
        with pytest.raises(CheckpointError, match="has no tensor lm_head"):
            ask("lm_head")
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"two\.safetensors is missing"):
        SafetensorsReader(tmp_path)


def test_a_shard_that_lacks_a_tensor_of_the_index_is_named(tmp_path: Path) -> None:
    sharded_folder(tmp_path)
    save_file({"other": MATRIX}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"names c in two\.safetensors, which lacks it"):
        SafetensorsReader(tmp_path)


def test_a_tensor_in_another_shard_than_the_index_says_is_named(tmp_path: Path) -> None:
    index = json.loads((sharded_folder(tmp_path) / INDEX).read_bytes())
    index["weight_map"]["a"] = "two.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"names a in two\.safetensors, which lacks it"):
        SafetensorsReader(tmp_path)


def test_an_index_beside_a_single_file_is_refused(tmp_path: Path) -> None:
    """transformers would read the single file, other tools the shards."""
    save_file({"a": MATRIX}, sharded_folder(tmp_path) / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"holds both model\.safetensors and {INDEX}; .* remove it"):
        SafetensorsReader(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"metadata": {}}', '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 3}}']
)
def test_a_broken_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json is broken"):
        SafetensorsReader(tmp_path)


def test_random_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    first = RandomReader(hf_config(), seed=1)
    before = torch.random.get_rng_state()
    again, other = RandomReader(hf_config(), seed=1), RandomReader(hf_config(), seed=2)
    assert torch.equal(before, torch.random.get_rng_state())
    name = "model.layers.3.mlp.up_proj.weight"
    assert torch.equal(first.read(name), again.read(name))
    assert not torch.equal(first.read(name), other.read(name))
    assert first.shape(name) == (96, 64)
    assert torch.equal(first.read(name, 0, 90, 96), first.read(name)[90:])
    assert first.read(name).std().item() == pytest.approx(hf_config().initializer_range, rel=0.05)


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe-mixed", "qwen3-moe"])
def test_random_experts_have_the_names_of_files(family: str) -> None:
    """In memory transformers keeps all experts of a layer in one tensor."""
    reader, shape = RandomReader(config_of(family), seed=1), weight_shape(config_of(family), 1)
    expected = {name for parameter in parameters(shape) for name in parameter.hf}
    assert set(reader.state) == expected


def test_the_configuration_chooses_the_reader(tmp_path: Path, hf_folder: Callable[..., Path]) -> None:
    source, config = hf_folder("qwen2"), config_of("qwen2")
    hf_to_mcore(source, tmp_path / "mcore", Cut(), NoReport())
    settings: dict[type, dict[str, Any]] = {
        RandomReader: {"path": str(source), "init": "random"},
        SafetensorsReader: {"path": str(source)},
        MegatronReader: {"path": str(tmp_path / "mcore")},
    }
    for kind, setting in settings.items():
        assert type(open_weights(ModelConfig(**setting), config, seed=0)) is kind


def info(*shape: int) -> TensorInfo:
    return TensorInfo(torch.float32, shape)


def test_shards_are_as_full_as_they_may_be() -> None:
    """A matrix has 48 bytes: two fill a shard of 100; a group stays together; a tensor above the limit gets its own file."""
    groups = [{"a": info(4, 3)}, {"b": info(4, 3)}, {"c": info(4), "d": info(9)}, {"large": info(40)}, {"e": info(1)}]
    assert [list(tensors) for tensors in plan_files(groups, 100).values()] == [["a", "b"], ["c", "d"], ["large"], ["e"]]
    assert list(plan_files(groups, 100)) == [f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    assert list(plan_files(groups, 1000)) == ["model.safetensors"]


def test_an_index_is_written_only_for_several_files(tmp_path: Path) -> None:
    write_index(tmp_path, {"model.safetensors": {"a": info(4)}})
    assert list(tmp_path.iterdir()) == []
    write_index(tmp_path, {"1.safetensors": {"a": info(4), "b": info(2)}, "2.safetensors": {"c": info(1)}})
    assert json.loads((tmp_path / INDEX).read_bytes()) == {
        "metadata": {"total_size": 28},
        "weight_map": {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"},
    }


def test_groups_are_the_tensors_of_a_parameter() -> None:
    groups = list(tensor_groups(weight_shape(config_of("qwen3"), 1), lambda _: torch.bfloat16))
    assert groups[2] == {
        f"model.layers.0.self_attn.{letter}_proj.weight": TensorInfo(torch.bfloat16, (rows, 32))
        for letter, rows in (("q", 64), ("k", 32), ("v", 32))
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The folder a run started from, with tokenizer files."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "tokenizer.json").write_text('{"kind": "tokenizer"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    (folder / "README.md").write_text("not copied")
    return folder


def export(
    weights: Iterator[tuple[str, torch.Tensor]], folder: Path, source: Path, config: Any, **options: Any
) -> None:
    common = dict(shape=weight_shape(config, 1), dtype=torch.float32, hf_config=config, source=source)
    save_hf_folder(weights, folder, **common, **{"step": 3, **options})


def unique_weights(config: Any) -> tuple[Any, list[tuple[str, torch.Tensor]]]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    return model, [(name, parameter.detach()) for name, parameter in model.named_parameters()]


@pytest.mark.parametrize(("tied", "shard_bytes"), [(False, 5_000_000), (True, 60_000)])
def test_transformers_loads_the_written_folder(tmp_path: Path, source: Path, tied: bool, shard_bytes: int) -> None:
    config = hf_config("qwen2", tied)
    model, weights = unique_weights(config)
    folder = tmp_path / "hf" / "step_3"
    export(iter(weights), folder, source, config, shard_bytes=shard_bytes)
    assert (folder / "tokenizer.json").read_text() == '{"kind": "tokenizer"}'
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": [2, 3]}
    assert not (folder / "README.md").exists()
    assert (folder / INDEX).exists() == tied
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    reader = SafetensorsReader(folder)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in weights)


def test_an_export_stops_where_its_run_did(tmp_path: Path, source: Path) -> None:
    config = hf_config("qwen2", True)
    _, weights = unique_weights(config)
    export(iter(weights), tmp_path / "hf", source, config, stop_token_ids=(2, 3, 9))
    assert GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id == [2, 3, 9]


def test_a_stream_may_reuse_its_buffer_and_have_any_order(tmp_path: Path, source: Path) -> None:
    _, weights = unique_weights(hf_config())
    buffer = torch.empty(10_000)

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in reversed(weights):
            view = buffer[: tensor.numel()].view(tensor.shape)
            yield name, view.copy_(tensor)

    export(stream(), tmp_path / "out", source, hf_config())
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == dict(weights).keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights)


def test_a_stream_that_fails_or_ends_early_keeps_the_earlier_folder(tmp_path: Path, source: Path) -> None:
    _, weights = unique_weights(hf_config())

    def failing() -> Iterator[tuple[str, torch.Tensor]]:
        yield from weights[:5]
        raise RuntimeError("a rank died")

    folder = tmp_path / "out"
    with pytest.raises(RuntimeError, match="a rank died"):
        export(failing(), folder, source, hf_config())
    assert not folder.exists()
    export(iter(weights), folder, source, hf_config())
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(RuntimeError, match="a rank died"):
        export(failing(), folder, source, hf_config())
    with pytest.raises(CheckpointError, match=r"lacks 1 of its tensors: lm_head\.weight"):
        export((pair for pair in weights if pair[0] != "lm_head.weight"), folder, source, hf_config())
    assert (folder / "model.safetensors").read_bytes() == before
    export(((name, tensor + 1) for name, tensor in weights), folder, source, hf_config(), shard_bytes=100_000)
    assert not (folder / "model.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.parametrize("place", ["out", "out.partial"])
def test_an_export_replaces_only_folders_that_an_export_wrote(tmp_path: Path, source: Path, place: str) -> None:
    _, weights = unique_weights(hf_config())
    theirs = tmp_path / place
    theirs.mkdir()
    (theirs / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=rf"{theirs} is where .* no export has made it .*; move it away"):
        export(iter(weights), tmp_path / "out", source, hf_config())
    assert (theirs / "notes.txt").read_text() == "mine" and exported_step(tmp_path / "out") is None

    theirs.rename(tmp_path / "moved")
    (tmp_path / place).mkdir()  # an empty folder may be replaced
    with pytest.raises(RuntimeError, match="killed"):
        export(itertools.chain(weights[:2], killed()), tmp_path / "out", source, hf_config())
    assert (tmp_path / "out.partial").is_dir()
    for step in (4, 5):
        export(iter(weights), tmp_path / "out", source, hf_config(), step=step)
        assert exported_step(tmp_path / "out") == step and not (tmp_path / "out.partial").exists()


def killed() -> Iterator[tuple[str, torch.Tensor]]:
    raise RuntimeError("killed")
    yield
