"""The training command of a script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from dapo_mcore.errors import ConfigError
from dapo_mcore.foreign.read.script import Start, text_of, training_start


def started(folder: Path, text: str) -> Start:
    (folder / "run.sh").write_text(text)

    def place(words: Sequence[str]) -> int | None:
        return words.index("train.py") if "train.py" in words else None

    return training_start(folder / "run.sh", place, "give another")


def test_the_words_after_the_program(tmp_path: Path) -> None:
    start = started(tmp_path, "ray start\nray job submit -- python3 train.py --a 1 | tee log")
    assert (start.entry, start.line) == ("train.py", 2)
    assert [[word.text for word in words] for words in start.passes] == [["--a", "1"]]


def test_no_command_and_several_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no training command in this script; give another"):
        started(tmp_path, "echo")
    with pytest.raises(ConfigError, match=r"2 training commands, in lines 1, 3; keep one"):
        started(tmp_path, "python train.py\n\npython train.py")


def test_a_loop_gives_its_passes(tmp_path: Path) -> None:
    start = started(tmp_path, "for x in 1 2; do\npython train.py $x\ndone")
    assert [[word.text for word in words] for words in start.passes] == [["1"], ["2"]]


def test_settings_cut_off_by_a_comment_are_told(tmp_path: Path) -> None:
    start = started(tmp_path, "python train.py a.b=1 \\\n  # a comment \\\n  a.c=2 \\\n  a.d=3\n")
    assert start.notes == (
        "line 3: a.c=2 and what follows never reach the training: "
        "the line before does not go on (a comment, or no backslash at its very end)",
    )


def test_scripts_beside_are_read_and_others_are_not(tmp_path: Path) -> None:
    folder = tmp_path / "project" / "examples" / "scripts"
    (folder / "models").mkdir(parents=True)
    (folder / "models" / "m.sh").write_text("M=(--layers 2)")
    (folder / ".env").write_text("M=(--secret 1)")
    (tmp_path / "far.sh").write_text("M=(--far 1)")
    text = 'source "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/models/m.sh"\npython train.py ${M[@]}'
    assert [word.text for word in started(folder, text).passes[0]] == ["--layers", "2"]
    for name in (".env", "../../../far.sh", str(tmp_path / "far.sh"), "~/x.sh"):
        start = started(folder, f"source {name}\npython train.py ${{M[@]}}")
        assert start.notes and "was not read" in start.notes[0]


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, message in (("gone", "No such file"), ("binary", "no UTF-8 text"), (".", "Is a directory")):
        with pytest.raises(ConfigError, match=message):
            text_of(tmp_path / name)
