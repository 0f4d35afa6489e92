"""Jobs for the tests of this folder: configurations over config.json of well-known models, without any folder or GPU."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from dapo_mcore.config.file import parse_config
from dapo_mcore.config.schema import Config
from dapo_mcore.plan.hardware import GPUS, Assumptions, assume
from dapo_mcore.plan.job import Cluster, Job, make_job

HUB = json.loads((Path(__file__).parents[1] / "architecture" / "hub_configs.json").read_text())

PAPER: dict[str, Any] = {
    "model": {"path": "unused", "dtype": "bf16", "recompute": "full"},
    "data": {"files": ["unused"]},
    "parallel": {"tensor_parallel": 8, "pipeline_parallel": 2, "sequence_parallel": True},
    "rollout": {
        "engine": "sglang",
        "sglang": {"colocated": True, "num_servers": 32, "tensor_parallel": 4, "placement": "nodes", "host": "node"},
    },
}
"""DAPO on Qwen2.5-32B as in examples/dapo_32b.yaml, with servers on the trainer's GPUs."""


@cache
def hub_config(model: str) -> Any:
    tree = dict(HUB[model])
    tree.pop("quantization_config", None)
    return CONFIG_MAPPING[tree["model_type"]].from_dict(tree)


def config_with(tree: dict[str, Any] = PAPER, **overrides: Any) -> Config:
    """Return the configuration. `overrides` are dotted keys, with a double underscore for each dot."""
    tree = json.loads(json.dumps(tree))
    for key, value in overrides.items():
        *sections, leaf = key.split("__")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    return parse_config(tree)


def job(
    of: str = "Qwen2.5-32B",
    nodes: int = 16,
    gpus_per_node: int = 8,
    gpu: str = "h100",
    assumed: dict[str, float] | None = None,
    hf_config: Any = None,
    **overrides: Any,
) -> Job:
    card, assumptions = assume(GPUS[gpu], Assumptions(), assumed or {})
    cluster = Cluster(card, gpus_per_node, nodes)
    return make_job(config_with(**overrides), hf_config or hub_config(of), cluster, assumptions)
