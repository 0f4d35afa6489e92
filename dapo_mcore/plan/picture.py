"""Plain-text bars and tables of memory, 100 columns wide.

Change here: letters and widths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dapo_mcore.plan.held import GIB, Use
from dapo_mcore.plan.memory import Memory

LETTERS = {
    "parameters": "P",
    "gradients": "G",
    "optimizer": "O",
    "reference": "R",
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
_BAR = 54
_WIDTH = 100


def bar(use: Use, width: int = _BAR) -> str:
    """Return a bar of `width` cells for the capacity. Each part has at least one cell; what does not fit goes beyond the end."""
    cells = ""
    position = 0.0
    for name, nbytes in use.parts.items():
        position += nbytes * width / use.capacity
        cells += LETTERS[name] * max(1, round(position) - len(cells))
    beyond = width + 6
    inside, outside = cells[:width].ljust(width, "."), cells[width:beyond]
    return f"|{inside}|{outside}" if not use.fits else f"|{inside}|"


def bars(memory: Memory) -> Iterator[str]:
    """Yield the picture of a GPU in every phase."""
    shown = [*_stages(memory), memory.sync, memory.server.use]
    label = max(len(_label(use)) for use in shown)
    capacity = memory.worst.capacity / GIB
    yield f"Memory of a GPU, GiB; the bar is all of its {capacity:.1f}"
    for use in shown:
        fits = use.fits and (use is not memory.server.use or memory.server.fits)
        yield f"  {_label(use):{label}} {bar(use)} {use.total / GIB:6.1f}{'' if fits else '  NO'}"
    used = dict.fromkeys(name for use in shown for name in use.parts)
    yield from wrapped("  ", [f"{LETTERS[name]} {name}" for name in used], "   ")


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


def wrapped(indent: str, words: Sequence[str], separator: str = ", ", hanging: int = 0) -> Iterator[str]:
    """Yield the words in lines of at most 100 columns. Later lines are indented by `hanging` more."""
    line, start = indent, indent
    for word in words:
        if len(line) > len(start) and len(line) + len(separator) + len(word) > _WIDTH:
            yield line
            line = start = " " * (len(indent) + hanging)
        line += (separator if len(line) > len(start) else "") + word
    yield line
