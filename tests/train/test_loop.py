"""Whole runs as users start them, on a task small enough for seconds."""

from __future__ import annotations

import gzip
import json
import re
import shutil

import pytest

from dapo_mcore.observe.metrics import describe
from tests.checkpoint.stored_checkpoint import flip
from tests.train.runs import QUICKSTART, SMALL, metrics, python, rewind, run
from tests.train.same_run import assert_same_run, assert_same_run_elsewhere

ODD = ["model.overrides={vocab_size: 37}", "checkpoint.every=1", "observe.samples_per_step=1000"]


@pytest.fixture(scope="module")
def pair(task) -> str:
    """Return the output of the run `pair` on two tensor-parallel ranks."""
    options = ["num_rollout_steps=2", *ODD, "parallel.sequence_parallel=true", "observe.profile_steps=[2]"]
    return run(task, "pair", *options, processes=2)


def test_a_run_on_two_processes_writes_every_documented_output(task, pair):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = task / "runs/pair"
    rows = metrics(task, "pair")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert {name for row in rows for name in row if describe(name) is None} == {"step"}
    assert rows[0]["val/heldout/mean@2"] >= 0
    assert rows[2]["updates"] == 4
    assert rows[1]["actor/first_update_ratio_deviation"] == 0.0
    assert rows[1]["mismatch/logprob_diff_max"] < 1e-4
    check_times(rows)
    assert len(list((folder / "samples").glob("*.jsonl"))) == 2
    assert [path.name for path in (folder / "profile").iterdir()] == ["step_000002.json.gz"]
    assert b'"aten::mm"' in gzip.decompress((folder / "profile/step_000002.json.gz").read_bytes())
    assert (folder / "plot.png").stat().st_size > 10_000
    model = AutoModelForCausalLM.from_pretrained(folder / "hf/final")
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf/final")
    assert model.config.num_hidden_layers == 2
    assert tokenizer.decode(tokenizer("12+34=", add_special_tokens=False)["input_ids"]) == "12+34="
    for expected in (
        "warm start ended at max_updates 4, short of stop_at 0.25",
        "step 2/2",
        "eval after step 2",
        "pair is done",
        "plot",
        "HF model",
        "metrics",
        "heldout 1",
    ):
        assert expected in pair


def test_a_run_that_goes_on_with_another_layout_and_an_odd_vocabulary_is_the_same(task, pair):
    """Two tensor-parallel ranks pad 37 words to 48, one rank pads them to 40."""
    shutil.copytree(task / "runs/pair", task / "runs/alone")
    rewind(task / "runs/alone", 1)
    assert "resumed after rollout step 1" in run(task, "alone", "num_rollout_steps=2", *ODD)
    assert_same_run_elsewhere(task / "runs/pair", task / "runs/alone")


def check_times(rows: list[dict]) -> None:
    """Check the times of a start with an evaluation, then of a step without and a step with one."""
    start, *steps = rows
    assert start["time/start_s"] > 0 and start["time/eval_s"] > 0 and "time/step_s" not in start
    assert ["time/eval_s" in row for row in steps] == [False, True]
    for row in steps:
        assert "time/start_s" not in row
        phases = [
            row.get(f"time/{name}_s", 0.0) for name in ("generate", "reward", "filter", "logprob", "train", "sync")
        ]
        assert 0 < sum(phases) <= row["time/step_s"]
        tokens = row["perf/tokens_per_s"] * row["time/step_s"]
        assert tokens == pytest.approx(round(tokens)) and tokens > 0
        assert row["perf/tokens_per_s_per_gpu"] == row["perf/tokens_per_s"] / 2
        assert row["perf/tflops_per_gpu"] > 0 and "perf/mfu/actor" not in row, "a CPU's peak is not known"


def test_a_resumed_run_repeats_the_uninterrupted_one_bitwise(task):
    options = ["num_rollout_steps=4", "checkpoint.every=2"]
    run(task, "whole", *options, "checkpoint.async_save=true")
    shutil.copytree(task / "runs/whole", task / "runs/parts")
    shutil.rmtree(task / "runs/parts/hf")  # as if killed before the export
    flip("shards/rank_00000.safetensors", -1)(task / "runs/parts/checkpoints/step_000004")
    output = run(task, "parts", *options, "checkpoint.every=3", "checkpoint.keep=2")
    assert "step_000004 was renamed to step_000004.corrupt, and the run goes on from step_000002" in output
    assert "resumed after rollout step 2" in output
    kept = sorted(path.name for path in (task / "runs/parts/checkpoints").iterdir())
    assert kept == ["step_000003", "step_000004", "step_000004.corrupt"]
    assert [row["step"] for row in metrics(task, "parts")] == [0, 1, 2, 3, 4]
    assert_same_run(task / "runs/whole", task / "runs/parts")
    final = "hf/final/model.safetensors"
    assert (task / "runs/whole" / final).read_bytes() == (task / "runs/parts" / final).read_bytes()


BAD_INPUT = {
    "batch.mini_batch_prompts=3": "batch.mini_batch_prompts 3 does not divide sampling.train_batch_prompts 8; use one of 1",
    "batch.max_tokens=16": "the longest sequence is data.max_prompt_tokens 8 + rollout.max_response_tokens 12 = 20 tokens",
    "data.files=[nowhere.jsonl]": "no data file at nowhere.jsonl",
    "data.files=[empty.jsonl]": "empty.jsonl",
    "data.answer_key=solution": "runs/arithmetic/train.jsonl row 1",
    "rollout.groupsize=4": "unknown key 'rollout.groupsize'; did you mean 'rollout.group_size'?",
    "parallel.tensor_parallel=2": "world size 1 is not a multiple of tensor_parallel 2",
    "model.path=nowhere": "nowhere",
    "model.path=no_eos": "EOS",
    "model.overrides={vocab_size: 10}": "but the model has vocab_size 10; use the model's own tokenizer",
    "model.overrides={hidden_act: gelu}": "hidden_act 'gelu' in config.json is not supported for Qwen2ForCausalLM; supported is 'silu'",
    "sampling={style: filter, max_gen_batches: 2, train_batch_prompts: 8, gen_batch_prompts: 8} warm_start=null eval.sets={}": (
        "0 of sampling.train_batch_prompts 8 groups have answers that vary after sampling.max_gen_batches 2 rounds"
    ),
}

# one process for all cases: importing costs more than failing
DRIVER = """
import contextlib, io, json, sys
from dapo_mcore.train.__main__ import main
results = []
for arguments in json.load(sys.stdin):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        status = main(arguments)
    results.append([status, errors.getvalue()])
print("RESULTS" + json.dumps(results))
"""


def test_bad_input_ends_with_status_2_and_a_message_with_numbers_and_remedy(task):
    (task / "empty.jsonl").write_text("")
    without_eos = shutil.copytree(task / "runs/arithmetic/model", task / "no_eos")
    settings = json.loads((without_eos / "tokenizer_config.json").read_text())
    (without_eos / "tokenizer_config.json").write_text(
        json.dumps({k: v for k, v in settings.items() if k != "eos_token"})
    )
    base = [QUICKSTART, *SMALL, "name=bad", "parallel.tensor_parallel=1", "num_rollout_steps=1"]
    done = python(task, "-c", DRIVER, stdin=json.dumps([[*base, *_split(case)] for case in BAD_INPUT]))
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(done.stdout.partition("RESULTS")[2])
    for (case, message), (status, output) in zip(BAD_INPUT.items(), results):
        assert status == 2, (case, output)
        assert output.startswith("error: "), (case, output)
        assert message in output, (case, output)
        assert "Traceback" not in output, (case, output)


def _split(case: str) -> list[str]:
    """Return the overrides of a case. Blanks separate them, except inside braces."""
    return re.split(r" (?![^{]*})", case)
