"""The hub: a fake one on loopback, with huggingface_hub as installed and with the version of transformers 4."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dapo_mcore.errors import ConfigError
from dapo_mcore.hub import HubRepo, download
from tests.fake_hub import COMMIT, FakeHub, fake_hub

ROOT = Path(__file__).parents[1]
FILES = {
    "config.json": b'{"a": 1}',
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"pickle",
    "onnx/m.json": b"1",
}
REPOS = {"models/Org/Tiny": FILES}
DOWNLOAD = """
from dapo_mcore.hub import *
try:
    folder = download(HubRepo("model", "Org/Tiny", None, "model.path"), ["*"], ["*/*", "*.bin"])
    print(sorted(path.name for path in folder.iterdir()))
except ConfigError as error:
    print(error)
"""


def repo(name: str = "Org/Tiny", revision: str | None = None) -> HubRepo:
    return HubRepo("model", name, revision, "model.path")


@pytest.fixture
def use(monkeypatch, tmp_path: Path) -> Callable[..., None]:
    """use(url, offline) lets huggingface_hub of this process take that hub, with a cache of its own."""
    from huggingface_hub import constants

    def change(url: str, offline: bool = False) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)

    return change


@pytest.fixture
def hub(use):
    with fake_hub(REPOS) as served:
        use(served.url)
        yield served


def test_files_that_match_are_downloaded_once_and_found_offline(hub: FakeHub, use):
    folder = download(repo(), ["*.json", "*.safetensors"], ["*/*"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "config.json": b'{"a": 1}',
        "model.safetensors": b"weights",
    }
    assert folder.name == COMMIT and not any(".bin" in path or "onnx" in path for path in hub.asked)
    hub.asked.clear()
    assert download(repo(), ["*.json", "*.safetensors"], ["*/*"]) == folder
    assert not any("resolve" in path for path in hub.asked)
    hub.asked.clear()
    use(hub.url, offline=True)
    assert download(repo(), ["*.json"], ["*/*"]) == folder and not hub.asked
    use("http://127.0.0.1:9")
    assert download(repo(), ["*.json"], ["*/*"]) == folder


@pytest.mark.parametrize(
    ("name", "revision", "told"),
    [
        (
            "Org/Absent",
            None,
            "Org/Absent: http.* has no such model, or it is private; correct the name, or set HF_TOKEN",
        ),
        ("Org/Tiny", "v9", "Org/Tiny at revision v9: http.* has no revision v9; give a branch, a tag or a commit"),
        ("Org/Ti..ny", None, "model.path: Cannot have -- or .. in repo_id"),
    ],
)
def test_what_the_hub_refuses_is_a_mistake(hub: FakeHub, name: str, revision: str | None, told: str):
    with pytest.raises(ConfigError, match=told):
        download(repo(name, revision), ["*"])


@pytest.mark.parametrize(("url", "offline"), [("http://127.0.0.1:9", False), ("http://hub.invalid", True)])
def test_without_the_hub_a_name_is_answered_at_once_with_what_to_do(use, tmp_path: Path, url: str, offline: bool):
    use(url, offline)
    start = time.monotonic()
    with pytest.raises(ConfigError) as error:
        download(repo(revision="v1"), ["*"])
    why = "HF_HUB_OFFLINE is set" if offline else "http://127.0.0.1:9 does not answer"
    assert f"Org/Tiny at revision v1 is not in the cache {tmp_path}/hub, and {why}" in str(error.value)
    assert "run `hf download Org/Tiny --revision v1` on a machine that reaches the hub" in str(error.value)
    assert time.monotonic() - start < 30, "no retries"


def test_a_cache_that_cannot_be_written_is_told(hub: FakeHub, tmp_path: Path):
    (tmp_path / "hub").write_text("a file")
    with pytest.raises(
        ConfigError, match=r"cannot be downloaded: .*; the cache is .*/hub, HF_HOME names another place"
    ):
        download(repo(), ["*"])


def ranks_of_torchrun(hub: FakeHub, folder: Path, number: int, command: str, *packages: str) -> list[str]:
    """Return what each of the ranks prints that one torchrun would start with a cache of its own."""
    ranks = []
    for rank in range(number):
        (logs := folder / "attempt_0" / str(rank)).mkdir(parents=True)
        told = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_ERROR_FILE": str(logs / "error.json")}
        paths = {"PYTHONPATH": os.pathsep.join([*packages, str(ROOT)]), "HF_HOME": str(folder), "HF_ENDPOINT": hub.url}
        options = {"env": {**os.environ, **told, **paths}, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        ranks.append(subprocess.Popen([sys.executable, "-c", command], **options, text=True))
    return [rank.communicate()[0] for rank in ranks]


@pytest.mark.parametrize("older", [False, True])
def test_ranks_of_a_node_ask_as_often_as_one(tmp_path: Path, older: bool):
    path = os.environ.get("DAPO_MCORE_TRANSFORMERS4")
    if older and not path:
        pytest.skip("needs DAPO_MCORE_TRANSFORMERS4")
    packages = [str(path)] if older else []
    with fake_hub(REPOS) as hub:
        told = ranks_of_torchrun(hub, tmp_path / "one", 1, DOWNLOAD, *packages)
        asked = hub.asked.copy()
        hub.asked.clear()
        assert ranks_of_torchrun(hub, tmp_path / "four", 4, DOWNLOAD, *packages) == told * 4
        assert hub.asked == asked and asked[f"GET /Org/Tiny/resolve/{COMMIT}/model.safetensors"] == 1
    assert told == ["['config.json', 'model.safetensors']\n"]


def test_ranks_of_a_node_see_one_refusal(tmp_path: Path):
    command = DOWNLOAD.replace("Org/Tiny", "Org/Absent")
    with fake_hub(REPOS) as hub:
        told = ranks_of_torchrun(hub, tmp_path, 3, command)
        assert hub.asked["GET /api/models/Org/Absent/revision/main"] == 1
    assert len(set(told)) == 1 and "Org/Absent: http" in told[0] and "has no such model" in told[0]


def test_processes_without_torchrun_download_each_file_once(tmp_path: Path):
    with fake_hub(REPOS) as hub:
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
        options = {"env": env, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        processes = [subprocess.Popen([sys.executable, "-c", DOWNLOAD], **options) for _ in range(2)]
        assert [process.wait() for process in processes] == [0, 0]
    loads = {path: number for path, number in hub.asked.items() if path.startswith("GET /Org")}
    assert loads == {f"GET /Org/Tiny/resolve/{COMMIT}/{name}": 1 for name in ("config.json", "model.safetensors")}
