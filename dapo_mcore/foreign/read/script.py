"""The one training command of a bash script, and the words that it gets.

Change here: how a training command is found among the commands of a script.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dapo_mcore.errors import ConfigError, shortened
from dapo_mcore.foreign.bash.follow import Call, follow
from dapo_mcore.foreign.bash.values import Value


class NotThisDialect(ConfigError):
    """The file may be a run, but it is none of the framework that was named."""


_LARGEST = 4 << 20
_PARENTS_OF_SOURCED = 4
_PARENTS_AROUND = 3


@dataclass(frozen=True, slots=True)
class Start:
    """A training command: its program, the words after it, once for each pass of a loop, and notes of the reader."""

    entry: str
    line: int
    passes: tuple[tuple[Value, ...], ...]
    depends: tuple[str, ...]
    notes: tuple[str, ...]


def training_start(file: Path, entry_of: Callable[[Sequence[str]], int | None], remedy: str) -> Start:
    """Return the training command of a script.

    entry_of: the place of the training program among the words of a command, None for any other command.
    remedy: what to do if there is none. Raises ConfigError for no command or several.
    """
    followed = follow(text_of(file), file, lambda name: _beside(file, name))
    found: dict[int, list[tuple[int, Call]]] = {}
    for call in followed.calls:
        place = entry_of([word.text for word in call.words])
        if place is not None:
            found.setdefault(call.line, []).append((place, call))
    if not found:
        raise NotThisDialect(f"{file}: no training command in this script; {remedy}")
    if len(found) > 1:
        lines = ", ".join(map(str, found))
        raise ConfigError(
            f"{file}: {len(found)} training commands, in lines {lines}; keep one of them in a copy of the script"
        )
    ((line, calls),) = found.items()
    place, first = calls[0]
    return Start(
        first.words[place].text,
        line,
        tuple(call.words[place + 1 :] for place, call in calls),
        first.depends,
        (*followed.notes, *_lost_lines(followed.calls)),
    )


def text_of(file: Path) -> str:
    """Return a file's text. Raises ConfigError if it cannot be read, is empty, or is too large for a script."""
    try:
        if file.stat().st_size > _LARGEST:
            raise ConfigError(
                f"{file}: {file.stat().st_size} bytes; a script or configuration of at most {_LARGEST} is expected"
            )
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; give the path of a script or configuration") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: no UTF-8 text; give the path of a script or configuration") from None
    if not text.strip():
        raise ConfigError(f"{file} is empty; give the path of a script or configuration")
    return text


def _beside(file: Path, name: str) -> Path | None:
    """Return the script that `source NAME` means if it lies in the script's folder or below one of its next parents.

    Only *.sh files: others, such as .env and .bashrc, hold the environment of a person, which is not read.
    """
    if not name.endswith(".sh") or name.startswith("~"):
        return None
    folders = [Path(), *file.resolve().parents[:_PARENTS_OF_SOURCED]]
    for folder in folders:
        path = (folder / name).resolve()
        near = file.resolve().parents[:_PARENTS_AROUND]
        if path.is_file() and any(path.is_relative_to(parent) for parent in near if parent != Path(parent.anchor)):
            return path
    return None


def _lost_lines(calls: Sequence[Call]) -> list[str]:
    """Return a note for each line that begins like a setting: a comment or a missing backslash has cut the command before it."""
    return [
        f"line {call.line}: {shortened(call.words[0].text)} and what follows never reach the training: "
        "the line before does not go on (a comment, or no backslash at its very end)"
        for call in calls
        if _is_setting(call.words[0].text)
    ]


def _is_setting(text: str) -> bool:
    if text.startswith("--") and len(text) > 2:
        return True
    key = text.lstrip("+").partition("=")
    return bool(key[1]) and "." in key[0] and all(part.isidentifier() for part in key[0].split("."))
