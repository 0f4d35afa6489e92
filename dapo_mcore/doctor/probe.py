"""A program that imports one package and prints as JSON what came of it. A package that aborts takes only this process along.

    python probe.py MODULE

Change here: what is asked of a package once it is imported. The standard library alone is imported at the top.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any


def torch_facts(torch: Any) -> dict[str, Any]:
    """Return what torch says of itself and of the GPUs: versions of CUDA, cuDNN and NCCL, and a dictionary per GPU."""
    cuda = torch.cuda.is_available()
    nccl = torch.cuda.nccl.version() if cuda and torch.distributed.is_nccl_available() else None
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "nccl": ".".join(map(str, nccl)) if nccl else None,
        "gpus": [gpu_facts(torch, number) for number in range(torch.cuda.device_count())] if cuda else [],
    }


def gpu_facts(torch: Any, number: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(number)
    free, total = torch.cuda.mem_get_info(number)
    capability = [properties.major, properties.minor]
    return {"name": properties.name, "total_bytes": total, "free_bytes": free, "capability": capability}


def loaded_libraries(part: str, maps: str) -> list[str]:
    """Return the files with `part` in their name that a process has loaded. `maps` is its /proc/PID/maps."""
    words = [line.split(maxsplit=5) for line in maps.splitlines()]
    paths = {found[5] for found in words if len(found) == 6}
    return sorted(path for path in paths if part in Path(path).name)


def main(name: str) -> None:
    report: dict[str, Any] = {"error": None}
    try:
        import torch  # extensions of torch need its libraries

        module = importlib.import_module(name)
        report |= torch_facts(torch) if name == "torch" else {"version": getattr(module, "__version__", None)}
    except BaseException as error:  # also SystemExit: whatever an import does, it is the report
        report["error"] = f"{type(error).__name__}: {error}"
    report["cudnn_files"] = loaded_libraries("libcudnn", Path("/proc/self/maps").read_text(encoding="utf-8"))
    print(f"\n{json.dumps(report)}")


if __name__ == "__main__":
    main(sys.argv[1])
