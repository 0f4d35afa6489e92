"""examples/dapo_32b.yaml against verl's script as `dapo-mcore import` reads it: its comments explain every difference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from dapo_mcore.config.file import load_config
from dapo_mcore.foreign.commands.import_run import imported
from dapo_mcore.foreign.write import default_of
from tests.foreign.scripts import DAPO_32B

EXAMPLE = Path(__file__).parents[2] / "examples" / "dapo_32b.yaml"
DIFFERENT = {
    "algo.tis.mode", "batch.shuffle", "checkpoint.keep", "data.deduplicate", "data.files", "eval.samples_per_prompt",
    "eval.sets.aime-2024", "eval.sets.aime24", "model.path", "name", "num_epochs", "num_rollout_steps",
    "observe.wandb_project", "optimizer.warmup_rollout_steps", "optimizer.warmup_updates", "output_dir",
    "parallel.data_parallel", "parallel.pipeline_parallel", "parallel.sequence_parallel", "parallel.tensor_parallel",
    "reward.function", "reward.overlong.max_length", "reward.workers", "rollout.sglang.server_args",
    "sampling.carry_surplus",
}  # fmt: skip


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The keys whose values differ, a whole evaluation set as one; open decisions differ."""
    script = tmp_path_factory.mktemp("verl") / "run_dapo_32b.sh"
    script.write_text(DAPO_32B, encoding="utf-8")
    conversion = imported("verl", script)
    assert set(conversion.asked) == {"num_epochs", "parallel.tensor_parallel"} and not conversion.losses
    theirs = {ours: value for ours, (value, _) in conversion.values().items()} | dict.fromkeys(conversion.asked, "???")
    ours = dict(_leaves(load_config(EXAMPLE).model_dump(mode="json"), ""))
    keys = [key for key in {*theirs, *ours} if not _is_whole(key, {*theirs, *ours})]
    return {_set_of(key) for key in keys if theirs.get(key, default_of(key)) != ours.get(key, default_of(key))}


def test_the_differences_are_those_that_are_known(differences: set[str]) -> None:
    assert differences == DIFFERENT


def test_each_difference_is_explained_beside_its_key(differences: set[str]) -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    lines = text.splitlines()
    places = dict(_places(yaml.compose(text), ""))
    comments = "\n".join(line.partition("#")[2] for line in lines)
    for key in differences:
        if key in places:
            line = places[key]
            assert "#" in lines[line] or lines[line - 1].lstrip().startswith("#"), (
                f"{key} differs, and nothing says why"
            )
        else:
            assert key.rpartition(".")[2] in comments, f"{key} of the imported script is not named"


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value and key != "server_args":
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _is_whole(key: str, keys: set[str]) -> bool:
    return any(other.startswith(f"{key}.") for other in keys)


def _set_of(key: str) -> str:
    return ".".join(key.split(".")[:3]) if key.startswith("eval.sets.") else key


def _places(node: yaml.Node, prefix: str) -> Iterator[tuple[str, int]]:
    """Yield each dotted key with its line, from 0."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield prefix + key.value, key.start_mark.line
            yield from _places(value, f"{prefix}{key.value}.")
