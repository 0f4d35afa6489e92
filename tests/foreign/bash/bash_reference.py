"""What bash itself makes of snippets, in an empty environment: the reference of the static reader."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from dapo_mcore.foreign.bash.follow import Followed, follow

_SHOW = 'show() { printf \'%s\\0\' "$#" "$@"; }\n'


def followed(text: str) -> Followed:
    return follow(text, Path("run.sh"), lambda name: None)


def shown(text: str) -> list[list[str]]:
    """Return the words of each `show …` that the static reader finds in a script."""
    return [[word.text for word in call.words[1:]] for call in followed(text).calls if call.words[0].text == "show"]


def shown_by_bash(texts: Sequence[str]) -> list[list[list[str]]]:
    """Return the words of each `show …` that bash calls in each text, all in one process, each in a subshell."""
    script = _SHOW + "".join(f"(\n{text}\n)\nprintf 'end\\0'\n" for text in texts)
    run = subprocess.run(["bash", "-c", script], capture_output=True, env={}, timeout=60, check=False)
    fields = iter(run.stdout.decode().split("\0")[:-1])
    results: list[list[list[str]]] = [[]]
    for field in fields:
        if field == "end":
            results.append([])
        else:
            results[-1].append([next(fields) for _ in range(int(field))])
    assert len(results) == len(texts) + 1, run.stderr.decode()
    return results[:-1]
