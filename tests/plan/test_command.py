"""The command line: a folder with nothing but config.json, and the errors of `dapo-mcore config`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dapo_mcore.cli import main
from tests.plan.jobs import HUB

ROOT = Path(__file__).parents[2]


@pytest.fixture
def paper(tmp_path: Path) -> list[str]:
    """The example with a folder of the model that has only config.json."""
    (tmp_path / "config.json").write_text(json.dumps(HUB["Qwen2.5-32B"]))
    return [str(ROOT / "examples" / "dapo_32b.yaml"), f"model.path={tmp_path}"]


def test_a_run_that_fits_and_one_that_does_not(
    paper: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--nodes", "16", "--assume", "kept_ratio=0.5", "--json", str(tmp_path / "plan.json")]
    assert main(["plan", *paper, *options]) == 0
    told = json.loads((tmp_path / "plan.json").read_text())
    assert told["fits"] and told["batch"]["groups_generated"] == 1024
    assert "Everything fits into memory." in capsys.readouterr().out
    embedded = ["rollout.engine=embedded", "rollout.sglang={}"]
    assert main(["plan", *paper, *embedded, "--gpu", "H100"]) == 1
    assert "most of it is embedded engine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["algo.clip_hi=1"], "did you mean 'algo.clip_high'"),
        (
            ["parallel.tensor_parallel=3", "parallel.data_parallel=null"],
            "tensor_parallel 3 does not divide num_attention_heads 40",
        ),
        (["model.path=./nowhere/Some-7B"], "the name of a model on the hub: Qwen/Qwen2.5-7B"),
        (["--nodes", "3"], "world size 24 is not tensor_parallel 8 × pipeline_parallel 2"),
        (["--assume", "mean_prompt_tokens=3000"], "mean_prompt_tokens=3000: data.max_prompt_tokens is 2048"),
        (["--assume", "mean_response_tokens=21000"], "rollout.max_response_tokens is 20480; give a mean of at most"),
        (["--nodes", "0"], "--nodes 0: there is at least 1"),
        (["--assume", "kept_ratio"], "--assume kept_ratio: it is not of the form NAME=NUMBER"),
        (["--assume", "kept_ratio=half"], "--assume kept_ratio=half: it is not of the form NAME=NUMBER"),
        (["model.fp8={first_last_bf16: 32}"], "model.fp8.first_last_bf16 32 keeps 64 layers in bf16"),
        (["model.recompute=[moe]"], "model.recompute moe would save nothing"),
        (["--json", "nowhere/plan.json"], "--json nowhere/plan.json cannot be written: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], message: str, paper: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *paper, *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dapo-mcore plan: ") and err.count("\n") == 1
    assert message in err
