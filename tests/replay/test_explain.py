"""Made-up records and real runs, with one planted change each: it is named, and everything before it is equal."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dapo_mcore.errors import RecordError
from dapo_mcore.replay.compare import Verdict
from dapo_mcore.replay.details import with_details
from dapo_mcore.replay.explain import Explanation, explain
from dapo_mcore.replay.record import StartRecord, StepRecord, write_start
from dapo_mcore.replay.recorded_run import RecordedRun
from tests.replay.planted import WEIGHTS, digest, in_batch, setting, step_record, unchanged, write_run
from tests.replay.real_runs import INDEX, TENSOR, make_models, train, values_of_the_bit


@pytest.fixture
def base(tmp_path) -> Path:
    return write_run(tmp_path / "base")


def equal_before(found: Explanation) -> bool:
    checks = found.checks[: found.checks.index(found.beyond.check)]
    return found.first == found.beyond and all(check.verdict is Verdict.EQUAL for check in checks)


def scaled(scale: float):
    """Return a change of all weights after a step."""
    return lambda r: replace(r, weights={name: digest(r.step, 5, i, scale=scale) for i, name in enumerate(WEIGHTS)})


def other_update(number: int, **changes):
    def change(record: StepRecord) -> StepRecord:
        updates = list(record.updates)
        updates[number] = replace(updates[number], **changes)
        return replace(record, updates=updates)

    return change


def swapped_prompts(record: StepRecord) -> StepRecord:
    first, second, third, fourth = record.prompts
    return replace(record, prompts=[first, third, second, fourth])


METRICS = step_record(2).updates[0].metrics
GRADIENTS = step_record(2).updates[1].gradients
OTHER_GRADIENTS = {**GRADIENTS, WEIGHTS[1]: digest(2, 1, 2, 1, scale=1 + 2**-23)}
PLANTED = {
    "seed": (unchanged, in_batch("seeds", slice(None), 7), "requests", "sample 0 (train.jsonl row 1, response 1 of 2)"),
    "version": (unchanged, in_batch("span_versions", 4, 0), "weight versions", "1 from token 0 against 0 from token 0"),
    "token": (unchanged, in_batch("tokens", 4, 0), "tokens", "token 4: "),
    "log-prob": (unchanged, in_batch("rollout_logprobs", 3, -9), "rollout log-probs", "against -9"),
    "reward": (unchanged, in_batch("rewards", 5, 0.5), "rewards", "sample 5 (train.jsonl row 3, response 2 of 2): reward"),
    "failure": (unchanged, in_batch("in_statistics", 1, False), "rewards", "in statistics True against False"),
    "order": (swapped_prompts, unchanged, "prompts", "the same 4 in another order, from number 2 on: uid21"),
    "plan": (lambda r: replace(r, plan=[r.plan[0], r.plan[1][::-1]]), unchanged, "plan", "mini-batch 2, replica 0"),
    "advantage": (lambda r: replace(r, inputs={**r.inputs, "advantages": digest(9)}), unchanged, "advantages", "norm"),
    "gradient": (other_update(1, gradients=OTHER_GRADIENTS), unchanged, "update 2: gradient", f"{WEIGHTS[1]}, norm"),
    "lr": (other_update(0, metrics=METRICS | {"lr": 2e-4}), unchanged, "update 1: metrics", "lr 0.0001 against 0.0002"),
    "weights": (scaled(1 + 2**-23), unchanged, "weights after", "3 of 3 tensors differ"),
}  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED)
def test_one_change_in_step_2_is_named(base, tmp_path, planted):
    in_step, in_samples, name, words = PLANTED[planted]
    other = write_run(tmp_path / "other", changes={2: (in_step, in_samples)})
    found = explain(base, other)
    assert (found.verdict, found.beyond.step, found.beyond.check.name) == (Verdict.DIFFERS, 2, name)
    assert words in found.beyond.check.detail
    assert found.steps == [1, 2] and found.shown == 2 and equal_before(found)
    assert found.settings == [] and found.notes == []


def test_equal_runs_are_equal_even_if_a_setting_differs(base, tmp_path):
    found = explain(base, write_run(tmp_path / "other", "seed=1", "observe.plot_at_end=false"))
    assert (found.verdict, found.steps, found.first) == (Verdict.EQUAL, [1, 2, 3], None)
    assert [tuple(setting) for setting in found.settings] == [("seed", 0, 1), ("observe.plot_at_end", True, False)]


def test_a_changed_weight_at_the_start_is_no_rounding_in_another_layout(base, tmp_path):
    """Loaded weights are the same bits in every layout."""

    def other(record: StartRecord) -> StartRecord:
        return replace(record, weights={**record.weights, WEIGHTS[2]: digest(0, 5, 2, scale=1 + 2**-23)})

    found = explain(base, write_run(tmp_path / "other", own=setting(tensor=2, data=1), start=other))
    assert (found.beyond.step, found.beyond.check.name) == (1, "weights before")
    assert found.beyond.check.place["tensor"] == WEIGHTS[2] and found.beyond.check.place["differing"] == 1


def test_another_layout_differs_only_in_rounding(base, tmp_path):
    own = setting(tensor=2, data=1)
    changes = {2: (scaled(1 + 1e-8), unchanged), 3: (scaled(1 - 3e-8), unchanged)}
    found = explain(base, write_run(tmp_path / "other", own=own, changes=changes))
    assert (found.verdict, found.steps, found.shown) == (Verdict.ROUNDING, [1, 2, 3], 2)
    assert (found.first.step, found.first.check.name) == (2, "weights after")
    assert 2.9e-8 < found.rounding < 6e-8  # projections of these records are up to twice the norm
    assert [tuple(setting) for setting in found.settings] == [("layout.tensor", 1, 2), ("layout.data", 2, 1)]


def test_a_token_that_differs_after_rounding_is_told_with_it(base, tmp_path):
    changes = {1: (scaled(1 + 1e-8), unchanged), 2: (unchanged, in_batch("tokens", 4, 0))}
    found = explain(base, write_run(tmp_path / "other", own=setting(tensor=2), changes=changes))
    assert (found.first.step, found.first.check.name) == (1, "weights after")
    assert (found.beyond.step, found.beyond.check.name) == (2, "tokens")


def test_rounding_lasts_after_a_start_in_another_layout(base, tmp_path):
    """A run whose second start had another layout keeps its roundings when a third one has the first layout again."""
    other = write_run(tmp_path / "other", changes={3: (scaled(1 + 1e-8), unchanged)})
    weights = step_record(1).weights, step_record(2).weights
    config = (other / "record/start_000000/config.yaml").read_text()
    write_start(other, StartRecord(1, 2, setting(tensor=2), weights[0]), config)
    write_start(other, StartRecord(2, 4, setting(), weights[1]), config)
    assert explain(base, other).verdict is Verdict.ROUNDING
    assert explain(base, other, step=3).verdict is Verdict.ROUNDING


def test_weights_that_change_between_two_starts_are_named(base, tmp_path):
    other = write_run(tmp_path / "other")
    weights = {**step_record(1).weights, WEIGHTS[0]: digest(9)}
    config = (other / "record/start_000000/config.yaml").read_text()
    write_start(other, StartRecord(1, 2, setting(), weights), config)
    found = explain(base, other)
    assert (found.beyond.step, found.beyond.check.name) == (2, "weights before")
    assert found.beyond.check.place["tensor"] == WEIGHTS[0]


def test_the_common_part_of_runs_of_other_lengths_is_compared(base, tmp_path):
    short = write_run(tmp_path / "short", steps=2)
    found = explain(short, base)
    assert (found.verdict, found.steps) == (Verdict.EQUAL, [1, 2])
    assert found.notes == [f"Only {base} has step 3, too."]


def test_one_step_alone_can_be_compared(base, tmp_path):
    other = write_run(tmp_path / "other", changes={1: (scaled(2.0), unchanged), 3: (scaled(2.0), unchanged)})
    found = explain(base, other, step=3)
    assert (found.steps, found.beyond.step, found.beyond.check.name) == ([3], 3, "weights after")
    found = explain(base, other, step=2)
    assert (found.steps, found.beyond.check.name) == ([2], "weights before")
    with pytest.raises(RecordError, match=r"no rollout step 7 in common: .*base has steps 1 to 3, .*other has steps 1"):
        explain(base, other, step=7)


def test_samples_whose_batch_is_deleted_are_not_compared(base, tmp_path):
    other = write_run(tmp_path / "other", changes={2: (scaled(2.0), lambda batch: None)})
    found = explain(base, other)
    unknown = [check for check in found.checks if check.verdict is Verdict.UNKNOWN]
    assert [check.detail for check in unknown] == [f"no batch of this step in {other} (observe.record_keep)"]
    assert found.beyond.check.name == "weights after"


def test_without_records_rows_of_metrics_are_compared(base, tmp_path):
    row = {"step": 1, "reward/mean": 0.5, "actor/loss": None, "time/step_s": 1.0, "rollout/retries": 0.0}
    for run, loss in ((base, 0.25), (tmp_path / "other", 0.125)):
        run.mkdir(exist_ok=True)
        first = row | {"val/a/acc": 1.0} if run == base else row
        rows = [first, row | {"step": 2, "actor/loss": loss, "time/step_s": loss}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    found = explain(base, tmp_path / "other")
    assert (found.beyond.step, found.beyond.check.name) == (2, "metrics")
    assert found.beyond.check.detail == "actor/loss 0.25 against 0.125; 1 of 3 metrics differ"
    note, alone = found.notes
    assert (
        note.startswith(f"Without records of {tmp_path / 'other'} their metrics are all") and "observe.record" in note
    )
    assert alone == "Not compared, since only one of the runs has them in a step: val/a/acc."


def test_what_cannot_be_compared_is_refused_with_the_remedy(base, tmp_path):
    with pytest.raises(RecordError, match=r"no run at .*nowhere; give the folder of a run"):
        explain(base, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecordError, match=r"empty has no records to compare: run it again with observe.record=true"):
        explain(base, tmp_path / "empty")


def test_nothing_is_said_of_samples_of_other_prompts(base, tmp_path):
    other = write_run(tmp_path / "other", changes={1: (swapped_prompts, in_batch("tokens", 4, 0))})
    found = explain(base, other)
    assert [check.name for check in found.checks[:3]] == ["weights before", "prompts", "samples"]
    assert found.checks[2].verdict is Verdict.UNKNOWN
    assert np.all([check.name != "tokens" for check in found.checks])


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the runs `base`, `seed`, `reward` and `bit`, which one process has made, and `layout` on two ranks."""
    folder = tmp_path_factory.mktemp("real")
    make_models(folder)
    train(folder, ["base"], ["seed", "seed=1"], ["reward"], ["bit", "model.path=bit"])
    train(folder, ["layout", "parallel.tensor_parallel=2"], processes=2)
    return folder / "runs"


def test_real_runs_that_differ_by_one_planted_change(real, monkeypatch):
    monkeypatch.chdir(real.parent)  # paths of a configuration are relative to where it was started
    found = explain(real / "base", real / "seed")
    assert (found.beyond.step, found.beyond.check.name) == (1, "prompts")
    assert [tuple(setting) for setting in found.settings] == [("seed", 0, 1)]

    found = explain(real / "base", real / "reward")
    assert (found.beyond.step, found.beyond.check.name) == (2, "rewards") and equal_before(found)
    assert found.beyond.check.place["values"]["score"][1] == 0.5 and found.settings == []

    found = explain(real / "base", real / "bit")
    assert (found.beyond.step, found.beyond.check.name) == (1, "weights before")
    element = found.beyond.check.place["element"]
    assert (element["tensor"], tuple(element["index"])) == (TENSOR, INDEX)
    assert element["values"] == values_of_the_bit(real.parent)

    found = explain(real / "base", real / "layout")
    assert found.verdict is Verdict.ROUNDING and found.steps == [1, 2]
    assert "layout.tensor" in [setting.name for setting in found.settings]

    # two gradient steps have moved every weight, and both runs have a checkpoint after them
    found = explain(real / "base", real / "bit", step=2)
    after = next(check for check in found.checks if check.name == "weights after")
    told = with_details(after, (RecordedRun(real / "base"), RecordedRun(real / "bit")), 2)
    a, b = told.place["element"]["values"]
    assert a != b and a == pytest.approx(b, rel=1e-3)
