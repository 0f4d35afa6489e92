"""The subcommand `dapo-mcore plan`: its options, and from them to a report.

Change here: an option.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from dapo_mcore.config.file import load_config
from dapo_mcore.config.schema import Config
from dapo_mcore.errors import ConfigError
from dapo_mcore.model_files.hf_config import load_hf_config
from dapo_mcore.plan.hardware import GPUS, Assumptions, assume
from dapo_mcore.plan.job import Cluster, Job, make_job
from dapo_mcore.plan.picture import WIDTH
from dapo_mcore.plan.plan import make_plan
from dapo_mcore.plan.remedies import problems
from dapo_mcore.plan.report import as_json, report
from dapo_mcore.plan.suggest import suggest

_NARROWEST = 80


def run(args: argparse.Namespace) -> int:
    """Print the plan. Return 0 if everything fits, else 1. Raises ConfigError as `dapo-mcore config` does."""
    config = load_config(args.file, args.overrides)
    chosen = _chosen(args.assume)
    job = _job(config, args, chosen)
    plan = make_plan(job)
    found = problems(plan)
    suggestions = suggest(plan) if args.suggest else None
    if args.json is not None:
        _write(args.json, as_json(plan, found, suggestions, list(chosen)))
    width = min(WIDTH, max(_NARROWEST, shutil.get_terminal_size((WIDTH, 24)).columns))
    print(*report(plan, args.gpu, found, suggestions, list(chosen), all_figures=args.figures, width=width), sep="\n")
    return 0 if plan.fits else 1


def _job(config: Config, args: argparse.Namespace, chosen: dict[str, float]) -> Job:
    for name in ("nodes", "gpus_per_node"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: there is at least 1; give how many you have")
    limits = {
        "mean_prompt_tokens": ("data.max_prompt_tokens", config.data.max_prompt_tokens),
        "mean_response_tokens": ("rollout.max_response_tokens", config.rollout.max_response_tokens),
    }
    for name, (key, limit) in limits.items():
        if chosen.get(name, 0) > limit:
            raise ConfigError(f"--assume {name}={chosen[name]:g}: {key} is {limit}; give a mean of at most that")
    gpu, assumptions = assume(GPUS[args.gpu], Assumptions(), chosen)
    cluster = Cluster(gpu, args.gpus_per_node, args.nodes or 0)
    return make_job(config, load_hf_config(config.model), cluster, assumptions)


def _chosen(given: list[str]) -> dict[str, float]:
    chosen = {}
    for text in given:
        name, separator, value = text.partition("=")
        try:
            chosen[name] = float(value)
        except ValueError:
            separator = ""
        if not separator:
            raise ConfigError(f"--assume {text}: it is not of the form NAME=NUMBER; --figures lists the names")
    return chosen


def _write(path: Path, found: object) -> None:
    try:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--json {path} cannot be written: {error.strerror}; name a file in a folder that exists"
        ) from None
