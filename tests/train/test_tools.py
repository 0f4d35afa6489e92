"""A whole run whose policy calls a tool, in one process on the embedded engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dapo_mcore.replay.record import read_batch
from tests.train.runs import metrics, run

CALL = '<tool_call>{"name": "sum", "arguments": {"expression": "6*7"}}</tool_call>'


@pytest.fixture
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


def test_a_policy_that_calls_a_tool_is_trained_on_what_it_wrote(task: Path, model: str):
    options = [
        f"model.path={model}",
        "tools=[{name: sum, function: calculator}]",
        'agent={output_template: "={output};", max_turns: 3}',
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
