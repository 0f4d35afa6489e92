"""One answer for all ranks of a node, before any group exists: the first rank that asks does the work, the others take its answer.

Change here: where the ranks of a node leave what they tell each other. torchrun gives each attempt a folder on each node, which
holds its ranks' error files; nothing of an earlier attempt is there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dapo_mcore.errors import ConfigError
from dapo_mcore.process.launcher import is_torchrun


def answer_of_node(environment: Mapping[str, str], question: str, ask: Callable[[], str]) -> str:
    """Return what `ask` returns, or raise the ConfigError that it raises. One rank of those that torchrun has started here calls it.

    question  ranks with the same one share the answer.
    The others wait as long as that rank asks. If it dies, or raises another error, the next one asks. Each process asks for itself
    without torchrun, and where its folder takes no locks.
    """
    folder = _attempt_folder(environment)
    if folder is None:
        return ask()
    answer = folder / f"answer-{hashlib.sha256(question.encode()).hexdigest()[:16]}.json"
    with _locked(answer.with_suffix(".lock")) as is_locked:
        if not is_locked:
            return ask()
        if not answer.exists():
            _write(answer, _result(ask))
        told = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in told:
        raise ConfigError(told["error"])
    return told["answer"]


def _attempt_folder(environment: Mapping[str, str]) -> Path | None:
    error_file = environment.get("TORCHELASTIC_ERROR_FILE") or os.devnull
    if not is_torchrun(environment) or error_file == os.devnull:
        return None
    folder = Path(error_file).parent.parent  # LOGS/attempt_0/RANK/error.json
    return folder if folder.is_dir() else None


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock of a file; yield False where the file system has none. The kernel ends it with its process."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            is_locked = True
        except OSError:
            is_locked = False
        yield is_locked


def _result(ask: Callable[[], str]) -> dict[str, str]:
    try:
        return {"answer": ask()}
    except ConfigError as error:
        return {"error": str(error)}


def _write(path: Path, content: Mapping[str, str]) -> None:
    """Write the file all at once: its process may be killed any time."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content), encoding="utf-8")
    partial.replace(path)
