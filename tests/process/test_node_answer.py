"""Ranks of a node share one answer: real processes with the variables of torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from dapo_mcore.errors import ConfigError
from dapo_mcore.process.node_answer import answer_of_node

ROOT = Path(__file__).parents[2]
RANK = """
import os, sys, time
from pathlib import Path
from dapo_mcore.errors import ConfigError
from dapo_mcore.process.node_answer import answer_of_node

asked, fate = Path(sys.argv[1]), sys.argv[2]

def ask():
    with asked.open("a") as file:
        first = file.tell() == 0
        file.write("x")
    time.sleep(0.2)  # the others arrive meanwhile
    if fate == "killed" and first:
        os.kill(os.getpid(), 9)
    if fate == "refused":
        raise ConfigError("no such model")
    return "/a/folder"

try:
    print(answer_of_node(os.environ, "q", ask))
except ConfigError as error:
    print("error:", error)
"""


def torchrun_variables(folder: Path, rank: int, attempt: int = 0) -> dict[str, str]:
    error_file = folder / f"attempt_{attempt}" / str(rank) / "error.json"
    error_file.parent.mkdir(parents=True, exist_ok=True)
    return {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_ERROR_FILE": str(error_file)}


def told_by_ranks(folder: Path, fate: str, numbers: Sequence[int] = range(4)) -> list[str]:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-S", "-c", RANK, str(folder / "asked"), fate],
            env={**os.environ, "PYTHONPATH": str(ROOT), **torchrun_variables(folder, rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in numbers
    ]
    return sorted(rank.communicate(timeout=60)[0].strip() for rank in ranks)


@pytest.mark.parametrize(
    ("fate", "told", "asked"),
    [
        ("answered", ["/a/folder"] * 4, "x"),
        ("refused", ["error: no such model"] * 4, "x"),
        ("killed", ["", *["/a/folder"] * 3], "xx"),
    ],
)
def test_one_rank_asks_and_the_others_take_its_answer(tmp_path: Path, fate: str, told: list[str], asked: str) -> None:
    assert told_by_ranks(tmp_path, fate) == told
    assert (tmp_path / "asked").read_text() == asked


def test_an_answer_is_for_its_question_and_its_attempt(tmp_path: Path) -> None:
    asked = iter(range(9))

    def ask() -> str:
        return str(next(asked))

    first, again = torchrun_variables(tmp_path, 0), torchrun_variables(tmp_path, 1, attempt=1)
    assert [answer_of_node(first, question, ask) for question in ("a", "b", "a", "b")] == ["0", "1", "0", "1"]
    assert answer_of_node(again, "a", ask) == "2"
    assert answer_of_node({}, "a", ask) == "3"
    assert answer_of_node({**first, "TORCHELASTIC_ERROR_FILE": os.devnull}, "a", ask) == "4"


def test_where_a_folder_takes_no_locks_each_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    asked: list[str] = []
    variables = torchrun_variables(tmp_path, 0)
    for _ in range(2):
        assert answer_of_node(variables, "q", lambda: asked.append("x") or "a") == "a"
    assert asked == ["x", "x"]


def test_another_error_is_no_answer(tmp_path: Path) -> None:
    def broken() -> str:
        raise RuntimeError("a mistake of ours")

    variables = torchrun_variables(tmp_path, 0)
    with pytest.raises(RuntimeError):
        answer_of_node(variables, "q", broken)
    assert answer_of_node(variables, "q", lambda: "a") == "a"
    with pytest.raises(ConfigError, match="no"):
        answer_of_node(variables, "other", lambda: _refuse("no"))


def _refuse(message: str) -> str:
    raise ConfigError(message)
