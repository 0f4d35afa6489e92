from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dapo_mcore import cli
from dapo_mcore.replay import report
from tests.replay.planted import WEIGHTS, digest, in_batch, setting, unchanged, write_run

SAME = "No setting differs."


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Write the run `runs/a`, and return a function that writes another one and compares the two by the command line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    write_run(tmp_path / "runs/a")

    def compare(capsys, *arguments: str, overrides: tuple[str, ...] = (), **changes) -> tuple[int, str]:
        write_run(tmp_path / "runs/b", *overrides, **changes)
        status = cli.main(["explain", "runs/a", "runs/b", *arguments])
        return status, capsys.readouterr().out

    return compare


def test_a_reward_that_differs(runs, capsys):
    changes = {3: (unchanged, in_batch("scores", 5, 0.5))}
    status, out = runs(capsys, "--json", "found.json", changes=changes)
    assert status == 1
    assert out.splitlines() == [
        "runs/a and runs/b first differ in rollout step 3, rewards: sample 5 (train.jsonl",
        "row 3, response 2 of 2): score -1.0 against 0.5.",
        "Before that all is equal: steps 1 to 2; in step 3 prompts, requests, weight",
        "versions, tokens, rollout log-probs.",
        SAME,
        "",
        "Step 3",
        "  prompts            equal         4 prompts",
        "  requests           equal         8 samples",
        "  weight versions    equal         8 samples of version 2",
        "  tokens             equal         71 tokens",
        "  rollout log-probs  equal         all, of the tokens that are equal",
        "  rewards            DIFFERS       see above",
        "  loss mask          equal         47 loss tokens",
        "  plan               equal         2 mini-batches",
        "  old log-probs      equal         1 tensor",
        "  advantages         equal         1 tensor",
        "  updates 1 to 2     equal",
        "  weights after      equal         3 tensors",
    ]
    found = json.loads(Path("found.json").read_text())
    assert (found["verdict"], found["steps"]) == ("differs", [1, 2, 3])
    assert found["first"] == found["first_beyond_rounding"]
    assert found["first"]["place"] == {"sample": 5, "values": {"score": [-1.0, 0.5]}}


def test_json_is_strict(runs, capsys, tmp_path):
    runs(capsys, "--json", "found.json", changes={1: (unchanged, in_batch("rewards", 5, float("nan")))})
    text = (tmp_path / "found.json").read_text()
    found = json.loads(text, parse_constant=pytest.fail)
    assert found["first"]["place"]["values"]["reward"] == [1.0, None]


def test_equal_runs(runs, capsys):
    status, out = runs(capsys, overrides=("seed=1",), steps=2)
    assert status == 0
    assert out.splitlines() == [
        "runs/a and runs/b are equal in rollout steps 1 to 2.",
        "Settings that differ: seed 0 against 1.",
        "Only runs/a has step 3, too.",
    ]


def test_a_gradient_that_differs_and_what_follows(runs, capsys):
    def change(record):
        updates = list(record.updates)
        updates[1] = replace(updates[1], gradients=updates[1].gradients | {WEIGHTS[0]: digest(9)})
        return replace(record, updates=updates, weights=record.weights | {WEIGHTS[0]: digest(8)})

    status, out = runs(capsys, changes={1: (change, unchanged)})
    assert status == 1
    starts = [line for line in out.splitlines() if line.startswith("  ") and line[2] != " "]
    assert [" ".join(line.split()[:4]) for line in starts[-5:]] == [
        "update 1 equal",
        "update 2: log-probs equal",
        "update 2: gradient DIFFERS",
        "update 2: metrics equal",
        "weights after follows embedding.word_embeddings.weight,",
    ]


def test_rounding(runs, capsys):
    def change(record):
        return replace(record, weights={name: digest(2, 5, i, scale=1 + 1e-8) for i, name in enumerate(WEIGHTS)})

    status, out = runs(capsys, own=setting(tensor=2, data=1), changes={2: (change, unchanged)})
    assert status == 0
    text = " ".join(out.split())
    assert text.startswith(
        "runs/a and runs/b differ only in rounding in rollout steps 1 to 3, by at most 1.8e-08; first in"
    )
    assert "Settings that differ: layout.tensor 1 against 2; layout.data 2 against 1." in text


def test_no_value_is_cut(runs, capsys):
    """A table folds long rows, and settings that are alike for long are shown from where they differ."""
    path = "/disk/" + "long/" * 20
    changes = {
        1: (
            lambda r: replace(r, weights={**r.weights, WEIGHTS[0]: digest(8)}, inputs={"advantages": digest(9)}),
            unchanged,
        )
    }
    _, out = runs(capsys, overrides=(f"output_dir={path}", f"data.files={path}a.jsonl"), changes=changes)
    table = out[out.index("Step 1") :]
    assert "…" not in table and "; 1 of 3 tensors differ" in " ".join(table.split())
    assert max(map(len, out.splitlines())) < 80
    assert "data.files ['runs/arithmetic/train.jsonl'] against ['/disk/long" in " ".join(out.split())


def test_long_values_are_shown_from_where_they_differ():
    a, b = report._values(f"{'long/' * 20}a.jsonl", f"{'long/' * 20}b.jsonl")
    assert (a[-12:], b[-12:]) == ("long/a.jsonl", "long/b.jsonl") and a[0] == "…" and len(a) < 60


def test_a_missing_record_and_an_unwritable_file_end_with_status_2(runs, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    assert cli.main(["explain", "runs/a", "empty"]) == 2
    assert capsys.readouterr().err == (
        "dapo-mcore explain: empty has no records to compare: run it again with observe.record=true\n"
    )
    assert cli.main(["explain", "runs/a", "runs/a", "--json", "empty"]) == 2
    assert "cannot write empty: Is a directory" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["start_000000/start.json", "step_000002/step.json", "step_000002/batch.safetensors"])
def test_a_flipped_bit_of_a_record_is_no_difference(runs, capsys, tmp_path, name):
    write_run(tmp_path / "runs/flipped")
    path = tmp_path / "runs/flipped/record" / name
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    assert cli.main(["explain", "runs/a", "runs/flipped"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.splitlines() == [
        f"dapo-mcore explain: runs/flipped/record/{name} is changed: its SHA-256 is not that of manifest.json; copy it again "
        "from where the run wrote it, or choose other steps"
    ]
