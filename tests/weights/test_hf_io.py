"""Model folders: read slice by slice with errors that name the file, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dapo_mcore.config import ModelConfig
from dapo_mcore.errors import CheckpointError
from dapo_mcore.weights.hf_io import RandomReader, SafetensorsReader, open_weights, save_hf_folder
from tests.actor.parity import hf_config

MATRIX = torch.arange(12, dtype=torch.float32).view(4, 3)


def sharded_folder(folder: Path) -> Path:
    """`a` and `b` in one shard, `c` in another."""
    save_file({"a": MATRIX, "b": torch.tensor([1.0, 2.0])}, folder / "one.safetensors")
    save_file({"c": MATRIX.to(torch.bfloat16)}, folder / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_slices_of_a_single_file(tmp_path: Path) -> None:
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
    assert torch.equal(reader.read("a"), MATRIX)
    assert reader.read("c", 1, 0, 1).tolist() == [[0], [3], [6], [9]]
    assert reader.read("c").dtype == torch.bfloat16


def test_errors_name_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor .* set model\.init random"):
        SafetensorsReader(tmp_path)
    reader = SafetensorsReader(sharded_folder(tmp_path))
    with pytest.raises(CheckpointError, match="has no tensor lm_head"):
        reader.read("lm_head")
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"two\.safetensors is missing"):
        reader.read("c")
    assert torch.equal(reader.read("a"), MATRIX)


def test_a_shard_that_lacks_what_the_index_says(tmp_path: Path) -> None:
    sharded_folder(tmp_path)
    save_file({"other": MATRIX}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"names c in two\.safetensors, which lacks it"):
        SafetensorsReader(tmp_path).shape("c")


@pytest.mark.parametrize("size", [-1, 40, 0])
def test_truncated_files(tmp_path: Path, size: int) -> None:
    save_file({"a": MATRIX}, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or broken"):
        SafetensorsReader(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"metadata": {}}'])
def test_broken_indices(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
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


def test_the_configuration_chooses_the_reader(tmp_path: Path) -> None:
    random = open_weights(ModelConfig(path=str(tmp_path), init="random"), hf_config(), seed=0)
    assert isinstance(random, RandomReader)
    reader = open_weights(ModelConfig(path=str(sharded_folder(tmp_path))), hf_config(), seed=0)
    assert isinstance(reader, SafetensorsReader)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The folder a run started from, with tokenizer files."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "tokenizer.json").write_text('{"kind": "tokenizer"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    (folder / "README.md").write_text("not copied")
    return folder


@pytest.mark.parametrize(("tied", "shard_bytes"), [(False, 5_000_000), (True, 60_000)])
def test_transformers_loads_the_written_folder(tmp_path: Path, source: Path, tied: bool, shard_bytes: int) -> None:
    config = hf_config("qwen2", tied)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    folder = tmp_path / "hf" / "step_3"
    save_hf_folder(iter(unique_weights(model)), folder, hf_config=config, source=source, shard_bytes=shard_bytes)
    assert (folder / "tokenizer.json").read_text() == '{"kind": "tokenizer"}'
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": [2, 3]}
    assert not (folder / "README.md").exists()
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    reader = SafetensorsReader(folder)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in unique_weights(model))


def test_shards_are_as_full_as_they_may_be(tmp_path: Path, source: Path) -> None:
    """48 bytes a matrix: two fill a shard of 100, a tensor beyond the limit gets its own."""
    weights = [("a", MATRIX), ("b", MATRIX), ("c", MATRIX), ("large", torch.zeros(40)), ("d", MATRIX)]
    save_hf_folder(iter(weights), tmp_path / "out", hf_config=hf_config(), source=source, shard_bytes=100)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [path.name for path in files] == [f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    assert [sorted(load_file(path)) for path in files] == [["a", "b"], ["c"], ["large"], ["d"]]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * 48 + 160
    assert index["weight_map"]["large"] == "model-00003-of-00004.safetensors"


def unique_weights(model: Any) -> list[tuple[str, torch.Tensor]]:
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


def test_a_stream_that_reuses_its_buffer_is_written_correctly(tmp_path: Path, source: Path) -> None:
    buffer = torch.zeros(2)

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for number in (1.0, 2.0):
            buffer.fill_(number)
            yield f"t{number:.0f}", buffer

    save_hf_folder(stream(), tmp_path / "out", hf_config=hf_config(), source=source)
    reader = SafetensorsReader(tmp_path / "out")
    assert [reader.read(name).tolist() for name in ("t1", "t2")] == [[1, 1], [2, 2]]


def test_a_stream_that_fails_leaves_the_folder_of_before(tmp_path: Path, source: Path) -> None:
    def failing() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", MATRIX
        yield "b", MATRIX
        raise RuntimeError("a rank died")

    folder = tmp_path / "out"
    with pytest.raises(RuntimeError, match="a rank died"):
        save_hf_folder(failing(), folder, hf_config=hf_config(), source=source, shard_bytes=50)
    assert not folder.exists()
    save_hf_folder(iter([("a", MATRIX)]), folder, hf_config=hf_config(), source=source)
    with pytest.raises(RuntimeError, match="a rank died"):
        save_hf_folder(failing(), folder, hf_config=hf_config(), source=source, shard_bytes=50)
    assert SafetensorsReader(folder).file_of == {"a": "model.safetensors"}
    save_hf_folder(iter([("c", MATRIX)]), folder, hf_config=hf_config(), source=source)
    assert SafetensorsReader(folder).file_of == {"c": "model.safetensors"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
