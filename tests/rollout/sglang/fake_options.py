"""The options of the fake server: their names and kinds, the report that installed.py would give, and the parser."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import yaml

FAKE_OPTIONS = {
    **dict.fromkeys(("model-path", "load-format", "dtype", "device", "tp-size", "host", "port"), "one"),
    **dict.fromkeys(("api-key", "admin-api-key", "log-level", "base-gpu-id", "mem-fraction-static"), "one"),
    **dict.fromkeys(("attention-backend", "sampling-backend", "grammar-backend"), "one"),
    **dict.fromkeys(("max-total-tokens", "max-running-requests"), "one"),
    **dict.fromkeys(("skip-tokenizer-init", "enable-memory-saver", "disable-overlap-schedule"), "flag"),
    **{
        "custom-weight-loader": "many",
        "disable-cuda-graph": "flag",
        "cuda-graph-bs-decode": "many",
        "lora-strict-loading": "pair",
    },
}


def installed(registered: bool) -> dict[str, Any]:
    """Return what installed.py reports. One option is known to the parser alone."""
    options = FAKE_OPTIONS | ({"of-a-plugin": "one"} if registered else {})
    return {"version": os.environ["FAKE_VERSION"], "models": ["llama", "qwen2"], "options": options}


def parsed(argv: list[str]) -> dict[str, Any]:
    """Return the options of a command line and of the YAML file that --config names."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    counts = {"one": {}, "many": {"nargs": "+"}, "flag": {"action": "store_true"}}
    for name, kind in FAKE_OPTIONS.items():
        parser.add_argument(f"--{name}", dest=name, **counts.get(kind, {"action": argparse.BooleanOptionalAction}))
    parser.add_argument("--config")
    arguments = vars(parser.parse_args(argv))
    arguments |= yaml.safe_load(Path(arguments["config"]).read_text())
    numbers = {name: int(arguments[name]) for name in ("port", "tp-size", "max-total-tokens")}
    return {**arguments, **numbers}
