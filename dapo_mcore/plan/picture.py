"""Plain-text bars and tables of memory, and lines folded to the width of a terminal.

Change here: letters and widths.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from textwrap import TextWrapper

from dapo_mcore.plan.held import GIB, Use
from dapo_mcore.plan.memory import Memory

LETTERS = {
    "parameters": "P",
    "gradients": "G",
    "optimizer": "O",
    "reference": "R",
    "critic": "C",
    "FP8 copies": "8",
    "activations": "A",
    "scratch": "S",
    "embedded engine": "E",
    "actor": "T",
    "servers' weights": "W",
    "KV cache": "K",
    "sync buckets": "B",
    "reserve": "r",
}
_KEPT = "\N{NO-BREAK SPACE}"
WIDTH = 100
"""Columns of a report where no terminal says how many it has."""
_BEYOND = 6
"""Cells of a bar for what does not fit."""


def bar(use: Use, cells: int) -> str:
    """Return a bar of so many cells for the capacity. Each part has at least one; what does not fit goes beyond the end."""
    filled = ""
    position = 0.0
    for name, nbytes in use.parts.items():
        position += nbytes * cells / use.capacity
        filled += LETTERS[name] * max(1, round(position) - len(filled))
    beyond = "" if use.fits else filled[cells : cells + _BEYOND]
    return f"|{filled[:cells]:.<{cells}}|{beyond}"


def bars(memory: Memory, width: int = WIDTH) -> Iterator[str]:
    """Yield the picture of a GPU in every phase."""
    shown = [*_stages(memory), memory.sync, memory.server.use]
    label = max(len(_label(use)) for use in shown)
    beyond = 0 if all(use.fits for use in shown) else _BEYOND
    cells = width - label - _BEYOND - len("  " + " ||" + "  123.4" + "  NO")
    yield f"Memory of a GPU, GiB; the bar is all of its {memory.worst.capacity / GIB:.1f}"
    for use in shown:
        fits = use.fits and (use is not memory.server.use or memory.server.fits)
        drawn = f"{bar(use, cells):{cells + 2 + beyond}}"
        yield f"  {_label(use):{label}} {drawn} {use.total / GIB:6.1f}{'' if fits else '  NO'}"
    used = dict.fromkeys(name for use in shown for name in use.parts)
    yield "  " + "   ".join(keep(f"{LETTERS[name]} {name}") for name in used)


def _stages(memory: Memory) -> Sequence[Use]:
    """Return the stages to show: all of up to four, else the fullest, the first and the last."""
    if len(memory.train) <= 4:
        return memory.train
    chosen = {0, len(memory.train) - 1, memory.train.index(memory.worst)}
    return [memory.train[stage] for stage in sorted(chosen)]


def _label(use: Use) -> str:
    return (
        use.where.replace("training, ", "train ")
        .replace(" (embedded engine)", "")
        .replace("servers on the same GPUs", "servers")
    )


def table(memory: Memory) -> Iterator[str]:
    """Yield the parts of the fullest GPU of each phase, in GiB."""
    phases = {"training": memory.worst, "sync": memory.sync, "generation": memory.server.use}
    names = dict.fromkeys(name for use in phases.values() for name in use.parts)
    yield f"  {'GiB on the fullest GPU':24}" + "".join(f"{phase:>12}" for phase in phases)
    for name in [*(name for name in names if name != "reserve"), "reserve"]:
        cells = (f"{use.parts[name] / GIB:12.2f}" if name in use.parts else f"{'-':>12}" for use in phases.values())
        yield f"  {name:24}" + "".join(cells)
    yield f"  {'sum':24}" + "".join(f"{use.total / GIB:12.2f}" for use in phases.values())


def keep(words: str) -> str:
    """Return the words so that `folded` leaves them on one line."""
    return words.replace(" ", _KEPT)


def folded(lines: Iterable[str], width: int = WIDTH) -> list[str]:
    """Return the lines with breaks between words where they are longer; what follows a break is indented by four more."""
    found: list[str] = []
    for line in lines:
        hanging = " " * (len(line) - len(line.lstrip()) + 4)
        fold = TextWrapper(width, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False)
        found += [line] if len(line) <= width else fold.wrap(line)
    return [line.replace(_KEPT, " ") for line in found]
