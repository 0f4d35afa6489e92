"""Where a model is: a folder, or a snapshot of a fake hub, which serves safetensors and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dapo_mcore.config.model import ModelConfig
from dapo_mcore.errors import ConfigError
from dapo_mcore.model_files.hf_config import load_hf_config, load_tokenizer, stop_token_ids
from dapo_mcore.model_files.hf_folder import open_weights
from dapo_mcore.model_files.model_folder import _snapshot, check_same_folder, has_weights, hub_name, side_files_folder
from dapo_mcore.model_files.model_folder import model_folder as folder_of
from tests.fake_hub import COMMIT, fake_hub


@pytest.fixture
def mine(tmp_path: Path, hf_folder, model_folder: Path) -> Path:
    """Return a folder with config.json, weights and a tokenizer."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for file in (*hf_folder("qwen2").glob("*.*"), *model_folder.glob("tokenizer*")):
        if file.name == "config.json" or "token" in file.name or file.suffix == ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path: Path, mine: Path):
    """A hub with Org/Tiny, also as pickle and code, and Org/Pickled."""
    from huggingface_hub import constants

    files = {path.name: path.read_bytes() for path in mine.iterdir()}
    pickled = {name: content for name, content in files.items() if not name.endswith(".safetensors")}
    more = {"pytorch_model.bin": b"pickle", "modeling.py": b"raise", "original/consolidated.safetensors": b"twice"}
    _snapshot.cache_clear()
    with fake_hub({"models/Org/Tiny": files | more, "models/Org/Pickled": pickled | more}) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.chdir(tmp_path)
        yield served
    _snapshot.cache_clear()


def test_a_model_of_the_hub_is_read_as_its_folder_is(hub, mine: Path):
    ours, theirs = ModelConfig(path=str(mine)), ModelConfig(path="Org/Tiny", revision="v1")
    config = load_hf_config(theirs)
    assert config.to_dict() | {"_name_or_path": ""} == load_hf_config(ours).to_dict() | {"_name_or_path": ""}
    assert load_tokenizer(theirs).get_vocab() == load_tokenizer(ours).get_vocab()
    assert stop_token_ids(theirs, load_tokenizer(theirs)) == stop_token_ids(ours, load_tokenizer(ours))
    assert not any("safetensors" in path for path in hub.asked), "weights are downloaded when they are read"
    name = "model.embed_tokens.weight"
    assert open_weights(theirs, config, 0).read(name).equal(open_weights(ours, config, 0).read(name))
    folder = side_files_folder(theirs)
    assert folder.name == COMMIT and has_weights(folder)
    asked = " ".join(hub.asked)
    assert not any(word in asked for word in ("pytorch_model.bin", ".py", "consolidated"))


def test_a_model_without_safetensors_is_refused(hub):
    assert (folder_of(ModelConfig(path="hf://Org/Pickled")) / "config.json").is_file()
    with pytest.raises(ConfigError, match=r"Org/Pickled has no safetensors.* pickled weights are never loaded"):
        folder_of(ModelConfig(path="Org/Pickled"), weights=True)


def test_weights_are_of_the_commit_of_the_files_beside_them(hub):
    model = ModelConfig(path="Org/Tiny", revision="v1")
    assert folder_of(model, weights=True) == folder_of(model)
    weights = [path for path in hub.asked if path.endswith(".safetensors")]
    assert weights and all(COMMIT in path for path in weights)
    assert f"GET /api/models/Org/Tiny/revision/{COMMIT}" in hub.asked, (
        "not v1 again, which may be another commit by then"
    )


def test_ranks_with_other_revisions_are_told_which():
    model = ModelConfig(path="Org/Tiny")
    check_same_folder(model, ["aaa", "aaa"])
    check_same_folder(model, [])  # on the other ranks
    with pytest.raises(
        ConfigError, match=r"model.path Org/Tiny is aaa on rank 0, but bbb on rank 2; set model.revision"
    ):
        check_same_folder(model, ["aaa", "aaa", "bbb", "bbb"])


def test_what_exists_here_is_a_folder_and_not_a_name(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    names = {"Org/Tiny": "Org/Tiny", "hf://models/mine": "models/mine", "Org/a.b-c_2": "Org/a.b-c_2"}
    assert {path: hub_name(path) for path in names} == names
    paths = ("models/mine", "models/other", "./Org/Tiny", "/Org/Tiny", "../a/b", "a", "a/b/c", "~/a", "hf://a")
    assert {hub_name(path) for path in paths} == {None}
    with pytest.raises(
        ConfigError, match=r"model.revision v1 is for a model on the hub, but model.path 'models/mine' is a folder"
    ):
        folder_of(ModelConfig(path="models/mine", revision="v1"))
    with pytest.raises(
        ConfigError, match=r"'models/other' is not a folder; .*or hf://Qwen/Qwen2.5-7B where a folder Qwen exists"
    ):
        folder_of(ModelConfig(path="models/other"))
    assert side_files_folder(ModelConfig(path="models/other")) == Path("models/other")


def test_weights_are_whole_if_every_file_of_the_index_is_there(tmp_path: Path):
    assert not has_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "m-1", "b": "m-2"}}))
    (tmp_path / "m-1").touch()
    assert not has_weights(tmp_path)
    (tmp_path / "m-2").touch()
    assert has_weights(tmp_path)
