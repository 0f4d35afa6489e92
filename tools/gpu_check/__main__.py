"""Run the parts of a GPU check, one after another, and record their results. tools/gpu_check.sh starts it.

Change here: add a part to `parts`. A part is a command; the JSON and JSON lines that it writes into its folder become the
`rows` of its record. Needs the standard library only, so that it can report which packages are missing.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TINY = os.environ.get("GPU_CHECK_TINY") == "1"
PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "transformers", "sglang")
GRACE_S = 30
"""Seconds from SIGTERM to SIGKILL; a training run stops its servers in this time."""


@dataclass(frozen=True)
class Part:
    """A command with its time limit. `{folder}` in an argument is the part's folder; `needs` are keys of NEEDS."""

    name: str
    minutes: float
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Record:
    """The result of a part. `state` is ok, failed, timeout, "needs …" or "no time left"."""

    part: str
    state: str
    seconds: float
    rows: list[Any]
    last_lines: list[str]


def parts() -> list[Part]:
    """Return all parts, the most valuable first."""
    pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
    some_tests = "tests/kernels/policy_loss/test_dispatch.py" if TINY else "tests/kernels"
    some_shapes = ("-k", "TP1-T256") if TINY else ("-k", "32B or memory_bound")
    colocated = () if TINY else ("GPU",)
    engine = () if TINY else ("GPU", "Transformer Engine")
    results = (("DAPO_MCORE_BENCH_RESULTS", "{folder}"),)
    return [
        Part("kernel-tests", 5, (*pytest, "-m", "not bench", some_tests), ("pytest",)),
        Part(
            "gpu-tests",
            4,
            (*pytest, "-m", "gpu and not bench", "--ignore", "tests/kernels", "tests"),
            ("pytest", "GPU"),
        ),
        Part("head", 8, (*pytest, "-m", "bench", "tests/kernels", *some_shapes), ("pytest", "rich"), results),
        Part("actors", 6, ("-m", "tools.gpu_check.actors", "{folder}"), ("megatron-core",)),
        Part("fp8", 3, ("-m", "tools.gpu_check.fp8", "{folder}"), ("megatron-core", *engine)),
        Part("fp8-tensor", 5, _colocated("fp8-tensor"), ("megatron-core", "SGLang", *colocated)),
        Part("fp8-disk", 5, _colocated("fp8-disk"), ("megatron-core", "SGLang", *colocated)),
        Part("cuda-graphs", 5, _colocated("cuda-graphs"), ("megatron-core", "SGLang", "GPU")),
        Part("cuda-graphs-released", 5, _colocated("cuda-graphs-released"), ("megatron-core", "SGLang", "GPU")),
    ]


def main(arguments: list[str]) -> int:
    """Run the parts. Return 1 if one failed or timed out, and 2 for wrong arguments."""
    minutes, folder, *names = [*arguments, *("30", "runs/gpu_check")[len(arguments) :]]
    chosen = [part for part in parts() if not names or part.name in names]
    unknown = set(names) - {part.name for part in chosen}
    if unknown or not minutes.replace(".", "", 1).isdigit():
        known = " ".join(part.name for part in parts())
        wrong = (
            f"part {min(unknown)} is unknown; use {known}" if unknown else f"MINUTES must be a number, got {minutes}"
        )
        print(f"error: gpu_check: {wrong}", file=sys.stderr)
        return 2
    results = Path(folder).absolute()
    results.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * float(minutes)
    node = {"part": "node", **describe_node()}
    write(results, node)
    print(node["gpu"] or "no GPU", *(f"{name} {node[name]}" for name in PACKAGES if node[name]), sep=", ")
    states = [report(results, run(part, results / part.name, deadline)) for part in chosen]
    print(f"results: {results / 'gpu_check.jsonl'}")
    return int(bool({"failed", "timeout"} & set(states)))


def run(part: Part, folder: Path, deadline: float) -> Record:
    """Run a part until it ends or its time is over, and return its record."""
    start = time.monotonic()
    missing = [need for need in part.needs if not NEEDS[need]()]
    if missing:
        return Record(part.name, f"needs {' and '.join(missing)}", 0.0, [], [])
    limit_s = min(60 * part.minutes, deadline - start - GRACE_S)
    if limit_s <= 0:
        return Record(part.name, "no time left", 0.0, [], [])
    folder.mkdir(exist_ok=True)
    for old in _outputs(folder):
        old.unlink()
    state = _execute(part, folder, limit_s)
    rows = [row for path in _outputs(folder) for row in _read(path)]
    last = [] if state == "ok" else (folder / "log.txt").read_text(errors="replace").splitlines()[-40:]
    return Record(part.name, state, round(time.monotonic() - start, 1), rows, last)


def report(results: Path, record: Record) -> str:
    """Write the record, print its line and return its state."""
    write(results, asdict(record))
    print(f"{record.part:<22}{record.seconds:>7.0f} s  {record.state}", flush=True)
    return record.state


def write(results: Path, record: dict[str, Any]) -> None:
    """Append a record to gpu_check.jsonl."""
    with (results / "gpu_check.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def describe_node() -> dict[str, Any]:
    """Return GPU, driver, versions, commit and date."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    gpus = _output(query).splitlines() if _has_gpu() else []
    commit = os.environ.get("DAPO_MCORE_BENCH_COMMIT") or _output(["git", "rev-parse", "--short=12", "HEAD"])
    return {
        "gpu": gpus[0] if gpus else None,
        "num_gpus": len(gpus),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "commit": commit or "unknown",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _execute(part: Part, folder: Path, limit_s: float) -> str:
    """Run the command in a session of its own, with its output in log.txt. Return ok, failed or timeout."""
    command = [sys.executable, *(argument.format(folder=folder) for argument in part.command)]
    environment = os.environ | {name: value.format(folder=folder) for name, value in part.environment}
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            return "ok" if process.wait(limit_s) == 0 else "failed"
        except subprocess.TimeoutExpired:
            return "timeout"
        finally:
            _end(process)


def _end(process: subprocess.Popen) -> None:
    """End the process and what it has left in its session: SIGTERM, then SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)


def _colocated(name: str) -> tuple[str, ...]:
    return ("-m", "tools.gpu_check.colocated", name, "{folder}")


def _outputs(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json*"))


def _read(path: Path) -> Iterator[Any]:
    text = path.read_text(encoding="utf-8")
    yield from ([json.loads(text)] if path.suffix == ".json" else map(json.loads, text.splitlines()))


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def _has_gpu() -> bool:
    return _output([sys.executable, "-c", "import torch; print(torch.cuda.is_available())"]) == "True"


def _has_sglang() -> bool:
    return "SGLANG_PYTHON" in os.environ or find_spec("sglang") is not None


NEEDS: dict[str, Callable[[], bool]] = {
    "GPU": _has_gpu,
    "SGLang": _has_sglang,
    "Transformer Engine": lambda: find_spec("transformer_engine") is not None,
    "megatron-core": lambda: _version("megatron-core") is not None,
    "pytest": lambda: find_spec("pytest") is not None,
    "rich": lambda: find_spec("rich") is not None,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
