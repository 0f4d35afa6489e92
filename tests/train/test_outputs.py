"""Runs that cannot train or cannot write: nothing is lost or half-written, and the user sees no traceback."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from dapo_mcore.errors import OutputError
from dapo_mcore.process.beacon import NullBeacon
from dapo_mcore.train.outputs import Outputs
from tests.examples.reliability_page import assert_told
from tests.train.runs import QUICKSTART, SMALL, metrics, python

# several runs in one process, since importing takes longer than a run. After the named call no file can exceed 10 bytes
RUNS = """
import json, os, resource, sys
from dapo_mcore.actor.parallel import layout
from dapo_mcore.controller import Controller
from dapo_mcore.train import outputs
from dapo_mcore.train.__main__ import main

free = resource.getrlimit(resource.RLIMIT_FSIZE)
full_from = None

def filling(owner, name):
    method = getattr(owner, name)
    def wrapper(*arguments, **more):
        if full_from == name:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, free[1]))
        return method(*arguments, **more)
    setattr(owner, name, wrapper)

filling(Controller, "rollout")
filling(outputs, "save_hf_folder")
for case, full_from in json.loads(os.environ["CASES"]):
    status = main([*sys.argv[1:], *case])
    resource.setrlimit(resource.RLIMIT_FSIZE, free)
    layout.stop()
    print("ENDED", status, flush=True)
"""
OPTIONS = ["warm_start=null", "parallel.tensor_parallel=1", "num_rollout_steps=1"]
NO_SERVER = ["rollout.engine=sglang", "rollout.sglang.urls=[http://127.0.0.1:1]"]
UNIFORM = "sampling={style: filter, max_gen_batches: 2, train_batch_prompts: 8, gen_batch_prompts: 8}"


def test_a_run_that_cannot_write_or_train_ends_with_its_reason_and_leaves_files_as_they_were(task):
    (task / "runs/file").write_text("mine")
    (task / "runs/kept").mkdir()
    (task / "runs/kept/metrics.jsonl").write_text('{"step": 1}\n')
    cases = [
        (["name=file"], None),
        (["name=x", "output_dir=runs/file"], None),
        (["name=kept", "model.overrides={hidden_act: gelu}"], None),
        (["name=new", "output_dir=elsewhere", "model.overrides={hidden_act: gelu}"], None),
        (["name=none", *NO_SERVER], None),
        (["name=uniform", UNIFORM], None),
        (["name=full", "checkpoint.at_end=false", "checkpoint.export_at_end=false"], "rollout"),
        (["name=export", "eval.sets={}"], "save_hf_folder"),
        (["name=export", "eval.sets={}"], None),
    ]
    arguments = ["-c", RUNS, QUICKSTART, *SMALL, *OPTIONS]
    done = python(task, *arguments, merge=True, CASES=json.dumps(cases))
    assert done.returncode == 0 and "Traceback" not in done.stdout, done.stdout
    statuses = [int(text.split()[0]) for text in done.stdout.split("ENDED ")[1:]]
    is_file, in_file, kept, new, none, uniform, full, export, again = done.stdout.split("ENDED ")[:-1]
    assert statuses == [2, 2, 2, 2, 2, 2, 0, 2, 0], done.stdout
    assert "error: cannot write to runs/file: File exists: runs/file; a file is in the place of a folder" in is_file
    assert "error: cannot write to runs/file/x: Not a directory" in in_file
    assert (task / "runs/file").read_text() == "mine"
    assert "hidden_act" in kept and "hidden_act" in new
    assert [path.name for path in (task / "runs/kept").iterdir()] == ["metrics.jsonl"]
    assert not (task / "elsewhere").exists()
    assert "error: no SGLang server answers: http://127.0.0.1:1" in none
    assert "start it, or correct rollout.sglang.urls" in none and not (task / "runs/none").exists()
    check_uniform(task, uniform)
    check_full(task, full)
    saved = "the last checkpoint is runs/export/checkpoints/step_000001; the same command goes on from there"
    assert f"error: cannot export the model to runs/export/hf/final ({saved}): File too large" in export
    assert "resumed after rollout step 1" in again and (task / "runs/export/hf/final/model.safetensors").exists()


def check_uniform(task: Path, output: str) -> None:
    assert "error: 0 of sampling.train_batch_prompts 8 groups have answers that vary" in output
    assert output.splitlines()[-1].endswith("; the step's samples are in runs/uniform/samples"), output
    assert_told("no group varies", output)
    samples = [json.loads(line) for line in (task / "runs/uniform/samples/step_000001.jsonl").read_text().splitlines()]
    assert len(samples) == 4 and not any(sample["acc"] for sample in samples)
    answers = [
        json.loads(line) for line in (task / "runs/uniform/samples/eval/step_000000.jsonl").read_text().splitlines()
    ]
    assert len(answers) == 4 and {answer["set"] for answer in answers} == {"heldout"}
    rows = metrics(task, "uniform")
    assert [row["step"] for row in rows] == [0, 1]
    assert (
        rows[1]["sampling/groups_all_wrong"] == rows[1]["sampling/groups_generated"] == 16
        and rows[1]["reward/acc"] == 0
    )


def check_full(task: Path, output: str) -> None:
    for what in (
        "write runs/full/metrics.jsonl",
        "write samples",
        "write answers",
        "write to TensorBoard",
    ):
        assert f"warning: cannot {what}: File too large" in output.replace("\n", " "), (what, output)
    assert "warning: cannot draw the plot: metrics.jsonl in runs/full has 0 rollout steps" in output.replace("\n", " ")
    assert "full is done" in output and [row["step"] for row in metrics(task, "full")] == [0]


def test_an_export_that_cannot_be_written_still_takes_what_the_other_ranks_send(tmp_path, monkeypatch):
    sent = iter(range(5))
    layout = SimpleNamespace(is_controller=True, beacon=NullBeacon(), on_controller_or_raise=lambda action: action())
    refused = Mock(side_effect=OutputError("the disk is full"))
    handover = SimpleNamespace(stream=lambda: sent)
    given = dict.fromkeys(("train_state", "phase", "line"), Mock())
    outputs = Outputs(Mock(), Mock(), Mock(), handover, layout, Mock(), **given)
    monkeypatch.setattr("dapo_mcore.train.outputs.save_hf_folder", refused)
    monkeypatch.setattr("dapo_mcore.train.outputs.side_files_folder", Mock())
    with pytest.raises(OutputError, match="the disk is full"):
        outputs.export(tmp_path, 1)
    assert list(sent) == []
