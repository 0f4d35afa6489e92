"""Settings and fixtures for all tests: threads, signals, the mode of Triton kernels, small model folders, optional real data."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: a second thread would only wait, which costs much on a busy machine

# a background job, or nohup, starts with these signals ignored, and the processes that tests start would inherit that
for number, handler in {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}.items():
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# Kernels run compiled where there is a GPU, and elsewhere in Triton's interpreter. Triton decides when a kernel's
# module is first imported, and megatron imports Triton: so set it here, before any test module.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    # otherwise xdist starts with the files that have most tests, and those are quick
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files with whole runs and real servers first, so that no worker starts a long one last."""
    longest = ("tests/train/", "tests/rollout/sglang/", "tests/checkpoint/")
    items.sort(key=lambda item: not item.nodeid.startswith(longest))


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """Return a function from a file's name to its path in $DAPO_MCORE_DATA (default: ../shared/data beside the repository).

    The function skips the test if the file is missing: the data are not part of this repository.
    """
    root = Path(os.environ.get("DAPO_MCORE_DATA") or Path(__file__).parents[2] / "shared" / "data")

    def path_of(name: str) -> Path:
        if not (root / name).exists():
            pytest.skip(f"no {name} in {root}; set DAPO_MCORE_DATA to a folder that has it")
        return root / name

    return path_of


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model folder whose tokens are characters, without weights (tests/model_files/character_model.py)."""
    from tests.model_files.character_model import CONFIG, write_tokenizer

    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_tokenizer(folder, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>")
    return folder


@pytest.fixture(scope="session")
def tokenizer(model_folder: Path):
    from dapo_mcore.config.model import ModelConfig
    from dapo_mcore.model_files.hf_config import load_tokenizer

    return load_tokenizer(ModelConfig(path=str(model_folder)))


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function (family, dtype, …) → a folder that transformers saved, plus tokenizer files. Do not write into it."""
    from tests.model_files.zoo import TEXTS, save_model

    made: dict[Any, Path] = {}

    def folder_of(name: str, dtype: torch.dtype = torch.float32, shard: str = "5GB", **changes: Any) -> Path:
        key = (name, dtype, shard, *changes.items())
        if key not in made:
            made[key] = save_model(tmp_path_factory.mktemp(name) / "hf", name, dtype, shard, **changes)
            for file, text in TEXTS.items():
                (made[key] / file).write_text(text)
        return made[key]

    return folder_of
