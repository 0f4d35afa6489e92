"""Whole runs whose policy calls a tool: in one process on the embedded engine, and one step ahead on a fake server."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from dapo_mcore.replay.record import read_batch
from tests.train.runs import metrics, rewind, run, stable
from tests.train.same_run import samples
from tests.train.served import run_served, trained

CALL = '<tool_call>{"name": "sum", "arguments": {"expression": "6*7"}}</tool_call>'


@pytest.fixture(scope="module")
def model(task: Path) -> str:
    """Return a model folder whose vocabulary has a token that is a whole call, so that a policy without any skill calls often."""
    folder = task / "runs/arithmetic/calling"
    shutil.copytree(task / "runs/arithmetic/model", folder)
    path = folder / "tokenizer.json"
    tree = json.loads(path.read_text())
    known = {**tree["model"]["vocab"], **{token["content"]: token["id"] for token in tree["added_tokens"]}}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tree["added_tokens"].append({"id": max(known.values()) + 1, "content": CALL, **flags})
    path.write_text(json.dumps(tree))
    return str(folder.relative_to(task))


ODD = "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n    return len(solution_str) % 2\n"
TOOLS = ["tools=[{name: sum, function: calculator}]", 'agent={output_template: "={output};", max_turns: 3}']


def test_a_policy_that_calls_a_tool_is_trained_on_what_it_wrote(task: Path, model: str):
    options = [
        f"model.path={model}",
        *TOOLS,
        "rollout.max_response_tokens=24",
        "warm_start=null",
        "num_rollout_steps=2",
        "observe.samples_per_step=1000",
        "checkpoint.every=null",
        "observe.record=true",
    ]
    run(task, "calling", *options)
    folder = task / "runs/calling"
    samples = [
        json.loads(line) for path in (folder / "samples").glob("*.jsonl") for line in path.read_text().splitlines()
    ]
    called = [sample for sample in samples if CALL in sample["response"]]
    answered = [sample for sample in called if f"{CALL}=42;" in sample["response"]]
    assert len(samples) == 64 and len(answered) > 5
    assert any(sample["response"].count("=42;") == 2 for sample in answered)
    for sample in called:
        calls = sample["response"].split(CALL)
        assert all(rest.startswith("=42;") for rest in calls[1:-1]) and len(calls) <= 4
    rows = metrics(task, "calling")
    assert all(row["mismatch/logprob_diff_max"] < 1e-4 for row in rows[1:])
    assert all(row["rollout/tokens_cut"] == 0 and row["reward/failures"] == 0 for row in rows[1:])
    assert "val/heldout/mean@2" in rows[0] and rows[2]["updates"] == 4
    assert all(row["turns/mean"] > 1 and row["tools/calls"] > 0 and row["tools/tokens"] > 0 for row in rows[1:])
    assert rows[0]["val/heldout/turns"] >= 1
    assert sum(len(sample.get("calls", ())) for sample in samples) == sum(row["tools/calls"] for row in rows[1:])
    for row in rows[1:]:
        own = row["response_length/mean"] - row["tools/tokens"]
        assert row["response_length/policy_mean"] == pytest.approx(own) and row["tools/tokens"] > 0
        assert row["sampling/generated_tokens"] == pytest.approx(own * row["sampling/samples_generated"])
    batch = read_batch(folder, 2).batch
    tool_tokens = [np.flatnonzero(~mask[mask.argmax() :]) for mask in np.split(batch.loss_mask, batch.offsets[1:-1])]
    assert sum(len(tokens) > 0 for tokens in tool_tokens) > 2, "recorded with holes in the loss mask"
    assert not batch.rollout_logprobs[~batch.loss_mask].any() and batch.rollout_logprobs[batch.loss_mask].all()


def test_a_resumed_run_with_tools_and_stop_texts_is_bitwise_the_same(task: Path, model: str):
    """Groups carried over the checkpoint hold turns, calls and holes in their loss masks."""
    (task / "odd.py").write_text(ODD)
    stops = [f";{digit}" for digit in range(10)]
    options = [
        f"model.path={model}",
        *TOOLS,
        f"rollout.stop={json.dumps(stops)}",
        f"reward.function={task}/odd.py:compute_score",
        "rollout.max_response_tokens=24",
        "sampling={style: filter, train_batch_prompts: 4, gen_batch_prompts: 12, max_gen_batches: 3}",
        "warm_start=null",
        "eval.sets={}",
        "num_rollout_steps=2",
        "observe.samples_per_step=1000",
        "observe.plot_at_end=false",
        "checkpoint.every=1",
    ]
    run(task, "whole", *options)
    carried = json.loads((task / "runs/whole/checkpoints/step_000001/state.json").read_text())["train"]["sampler"]
    assert any(sample["calls"] for group in carried["groups"] for sample in group["samples"]), "or nothing is tested"
    shutil.copytree(task / "runs/whole", task / "runs/parts")
    rewind(task / "runs/parts", 1)
    assert "resumed after rollout step 1" in run(task, "parts", *options)
    whole, parts = task / "runs/whole", task / "runs/parts"
    assert [*map(stable, metrics(task, "whole"))] == [*map(stable, metrics(task, "parts"))]
    assert _without_clock(samples(whole)) == _without_clock(samples(parts))
    final = "hf/final/model.safetensors"
    assert (whole / final).read_bytes() == (parts / final).read_bytes()

    ended = 0
    for sample in samples(whole):
        *before, last = sample["response"].split(f"{CALL}=42;")
        found = [re.search(r";\d", turn) for turn in (*before, last)]
        assert not any(found[:-1]), "a stop text ends the response, whatever may follow"
        if found[-1] is not None:
            assert found[-1].end() == len(last) and sample["finish_reason"] == "stop"
            ended += 1
    assert ended > 1
    assert any(re.search(r"=42;\d", sample["response"]) for sample in samples(whole)), "half of it is the tool's text"


def _without_clock(rows: list[dict]) -> list[dict]:
    return [{**row, "calls": [call | {"seconds": 0.0} for call in row.get("calls", ())]} for row in rows]


def test_steps_ahead_train_on_episodes_of_the_weights_before(task: Path, model: str, fake: Path):
    """A fake server repeats what it is asked until there is no room, with log-probs of -(token + 1) / 32. So a turn repeats the prompt
    up to its call, or to the stop text, and what follows is cut off. A text that only the tool writes ends nothing."""
    prompts = {f"3+4={CALL}": f"3+4={CALL}=42;3+4={CALL}=42;3+4={CALL}", f"9-;2{CALL}": "9-;2"}
    rows = [{"prompt": prompt, "answer": number} for number, prompt in enumerate(prompts)]
    (task / "calls.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [
        f"model.path={model}",
        *TOOLS,
        'rollout.stop=[";2", "=4"]',
        "data={files: [calls.jsonl], answer_key: answer, source_key: null, max_prompt_tokens: 8}",
        "rollout.max_response_tokens=24",
        "num_rollout_steps=3",
        "sampling={style: none, train_batch_prompts: 2, max_staleness: 2, max_in_flight_groups: 2}",
        "batch.mini_batch_prompts=1",
        "observe.record=true",
        "observe.plot_at_end=false",
    ]
    done = run_served(task, fake, "ahead", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [max(groups.values()) for groups in trained(task, "ahead").values()] == [0, 0, 1]
    folder = task / "runs/ahead"
    assert all(row["response"] == prompts[row["prompt"]] and "version_spans" not in row for row in samples(folder))
    for row, step in zip(metrics(task, "ahead"), (1, 2, 3), strict=True):
        assert row["actor/first_update_ratio_deviation"] == 0.0, "old log-probs are those of the newest weights"
        assert row["tools/calls"] == 8 and row["updates"] == 2 * step
        batch = read_batch(folder, step).batch
        for sample in range(8):
            span = slice(batch.offsets[sample], batch.offsets[sample + 1])
            tokens, mask, logprobs = batch.tokens[span], batch.loss_mask[span], batch.rollout_logprobs[span]
            own = np.flatnonzero(mask) - mask.argmax()
            expected = [0, 1, 2, 3, 4, 9, 10, 11, 12, 13, 18, 19, 20, 21, 22]
            assert own.tolist() in (expected, [0, 1, 2, 3])
            assert logprobs == pytest.approx(np.where(mask, -(tokens + 1) / 32, 0))
