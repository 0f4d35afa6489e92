"""Splits of data sets on a fake hub: the rows of the same JSONL, online and from the cache."""

from __future__ import annotations

from importlib import util
from pathlib import Path

import pytest

from dapo_mcore.data.hub_split import is_hub_split, split_files
from dapo_mcore.data.rows import read_rows
from dapo_mcore.data.sources import sources
from dapo_mcore.errors import ConfigError, DataError
from tests.fake_hub import fake_hub

needs_datasets = pytest.mark.skipif(util.find_spec("datasets") is None, reason="needs datasets")

CONFIGS = b"""---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: [main/test-*]
- config_name: other
  data_files: other/*.jsonl
---
Sums
"""


def rows(*names: str) -> bytes:
    return b"".join(b'{"prompt": "%s", "answer": 1}\n' % name.encode() for name in names)


REPOS = {
    "datasets/org/sums": {
        "README.md": CONFIGS,
        "main/train-1.jsonl": rows("a", "b"),
        "main/train-2.jsonl": rows("c"),
        "main/test-1.jsonl": rows("d"),
        "other/all.jsonl": rows("e"),
        "other/more.py": b"raise SystemExit",
    },
    "datasets/org/plain": {"train.jsonl": rows("f"), "test.json": b'[{"prompt": "g", "answer": 1}]', "code.pkl": b"no"},
}


@pytest.fixture
def hub(monkeypatch, tmp_path: Path):
    from huggingface_hub import constants

    split_files.cache_clear()
    with fake_hub(REPOS) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield served
    split_files.cache_clear()


def prompts(entry: str) -> list[str]:
    return [row.columns["prompt"] for row in read_rows([entry])]


SPLITS = {
    "hf://org/sums/main:train": ["a", "b", "c"],
    "hf://datasets/org/sums@v1/main:test": ["d"],
    "hf://org/sums/other:train": ["e"],
    "hf://org/plain:train": ["f"],
    "hf://org/plain@main:test": ["g"],
}


@needs_datasets
def test_a_split_has_its_rows_online_and_from_the_cache(hub, monkeypatch):
    from huggingface_hub import constants

    assert {entry: prompts(entry) for entry in SPLITS} == SPLITS
    (*_, last) = read_rows(["hf://org/sums/main:train"])
    assert last.where == "hf://org/sums/main/train-2.jsonl row 1"
    loaded = " ".join(hub.asked)
    assert ".py" not in loaded and ".pkl" not in loaded
    split_files.cache_clear()
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert {entry: prompts(entry) for entry in SPLITS} == SPLITS and not hub.asked


@needs_datasets
def test_only_the_files_of_the_configuration_are_downloaded(hub):
    prompts("hf://org/sums/main:test")
    assert not any("other" in path for path in hub.asked)


@needs_datasets
@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("hf://org/sums/main:dev", "the data set has no split dev; it has train, test"),
        (
            "hf://org/sums:train",
            r"among the available configs: \['main', 'other'\]; a configuration is named as hf://ORG/NAME/",
        ),
        ("hf://org/sums/none:train", "'none' not found"),
        ("hf://org/sums", "names no split of a data set on the hub; write hf://ORG/NAME:SPLIT"),
        ("hf://sums:train", "names no split"),
    ],
)
def test_a_mistake_in_an_entry_is_told_with_what_there_is(hub, entry: str, told: str):
    with pytest.raises(DataError, match=told):
        split_files(entry)


def test_an_entry_without_its_prefix_is_no_file_and_is_told_it():
    with pytest.raises(
        DataError, match="no data file at openai/gsm8k/main:train; a data set on the hub is hf://openai/gsm8k/main:t"
    ):
        sources("openai/gsm8k/main:train")


def test_without_datasets_the_package_is_named(hub, monkeypatch):
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package datasets, .*pip install 'dapo_mcore\[datasets\]'"):
        split_files("hf://org/plain:train")
    assert is_hub_split("hf://org/plain:train") and not is_hub_split("org/plain:train")
