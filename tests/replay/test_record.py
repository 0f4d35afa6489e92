from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from dapo_mcore.batch.collate import to_train_batch
from dapo_mcore.errors import RecordError
from dapo_mcore.model_files.manifest import write_manifest
from dapo_mcore.replay import record as records
from dapo_mcore.replay.record import (
    BatchRecord,
    Digest,
    Origins,
    PromptRecord,
    Setting,
    StartRecord,
    StepRecord,
    UpdateRecord,
)
from dapo_mcore.types import Group, Prompt, Rollout, Sample, Score

DIGEST = Digest("00ff00ff00ff00ff", 0.1 + 0.2, -1e-310)
SETTING = Setting({"world_size": 2, "tensor": 2}, {"torch": "2.13"}, {"cpu": 2}, {"deterministic": "False"})


def step_record(step: int, *, loss: float = 1 / 3) -> StepRecord:
    update = UpdateRecord({"loss": loss, "grad_norm": math.nan, "lr": 1e-3}, True, DIGEST, {"decoder.w": DIGEST})
    return StepRecord(
        step=step,
        num_updates=2 * step,
        shuffle_seed=None,
        prompts=[PromptRecord("train:ab", "train.jsonl row 18"), PromptRecord("train:cd", "Zeile ü")],
        plan=[[[[0, 2], []], [[1], [3]]]],
        inputs={"advantages": DIGEST},
        updates=[update],
        weights={"decoder.w": DIGEST},
    )


def batch_record() -> BatchRecord:
    """Return two groups of two samples; the second sample was made by versions 3 and 4, the third by none that is told."""
    prompts = [Prompt(uid, np.array([7, 8, 9][: 2 + n], np.int32), "", "") for n, uid in enumerate(("a", "b"))]

    def sample(length: int, reason: str, version: int, spans=(), seed: int | None = None) -> Sample:
        ids = np.arange(length, dtype=np.int32)
        rollout = Rollout(ids, -ids.astype(np.float32), ids % 2 == 0, reason, version, spans, seed)
        return Sample(rollout, "", Score(reward=0.5, score=1.0, acc=True, penalty=-0.5))

    groups = [
        Group(prompts[0], (sample(3, "stop", 3, seed=2**63 - 1), sample(4, "length", 3, ((0, 3), (2, 4)), seed=5))),
        Group(prompts[1], (sample(1, "stop", 2), sample(2, "abort", 3))),
    ]
    return BatchRecord(to_train_batch(groups, overlong_filter=False), Origins.of(groups))


def test_a_step_and_its_batch_are_read_back_bit_for_bit(tmp_path):
    batch = batch_record()
    records.write_step(tmp_path, step_record(12), records.write_batch(tmp_path, 12, batch))
    assert sorted(path.name for path in (tmp_path / "record/step_000012").iterdir()) == [
        "batch.safetensors",
        "manifest.json",
        "step.json",
    ]
    assert repr(records.read_step(tmp_path, 12)) == repr(step_record(12))  # NaN is not equal to itself
    found = records.read_batch(tmp_path, 12)
    for part, expected in ((found.batch, batch.batch), (found.origins, batch.origins)):
        for name, array in asdict(expected).items():
            assert getattr(part, name).dtype == array.dtype and np.array_equal(getattr(part, name), array), name


def test_correctness_of_an_earlier_version_is_read_as_a_number(tmp_path):
    batch = batch_record()
    bools = replace(batch, origins=replace(batch.origins, accs=batch.origins.accs > 0))
    records.write_step(tmp_path, step_record(3), records.write_batch(tmp_path, 3, bools))
    accs = records.read_batch(tmp_path, 3).origins.accs
    assert accs.dtype == np.float64 and np.array_equal(accs, batch.origins.accs)


def test_origins_name_seed_versions_and_score_of_each_sample():
    origins = batch_record().origins
    assert origins.seeds.tolist() == [2**63 - 1, 5, -1, -1]
    assert origins.weight_versions.tolist() == [3, 3, 2, 3]
    assert [records.FINISH_REASONS[code] for code in origins.finish_reasons] == ["stop", "length", "stop", "abort"]
    spans = zip(origins.span_samples.tolist(), origins.span_starts.tolist(), origins.span_versions.tolist())
    assert list(spans) == [(0, 0, 3), (1, 0, 3), (1, 2, 4), (2, 0, 2), (3, 0, 3)]
    assert (origins.scores.tolist(), origins.penalties.tolist()) == ([1.0] * 4, [-0.5] * 4) and origins.accs.all()


def test_a_resumed_run_forgets_what_came_after_and_keeps_the_rest(tmp_path):
    for step in (1, 2, 3):
        records.write_step(tmp_path, step_record(step))
    for after in (0, 2):
        records.write_start(tmp_path, StartRecord(after, 2 * after, SETTING, {"w": DIGEST}), f"name: run{after}\n")
    assert records.read_start(tmp_path, 2).after_step == 0 and records.read_start(tmp_path, 3).after_step == 2
    records.write_batch(tmp_path, 4, batch_record())  # the run was killed before the end of step 4
    assert records.recorded_steps(tmp_path) == [1, 2, 3]
    records.forget_after(tmp_path, 2)
    assert (records.recorded_steps(tmp_path), records.recorded_starts(tmp_path)) == ([1, 2], [0])
    assert records.read_start(tmp_path, 1) == StartRecord(0, 0, SETTING, {"w": DIGEST})
    assert records.config_path(tmp_path, 0).read_text() == "name: run0\n"
    records.write_step(tmp_path, step_record(2, loss=0.5))
    assert records.read_step(tmp_path, 2).updates[0].metrics["loss"] == 0.5
    left = sorted(path.name for path in (tmp_path / "record").iterdir())
    assert left == ["start_000000", "step_000001", "step_000002"]


def test_old_batches_go_and_digests_stay(tmp_path):
    for step in (1, 2, 3):
        records.write_step(tmp_path, step_record(step), records.write_batch(tmp_path, step, batch_record()))
        records.drop_batches(tmp_path, step, keep=2)
    assert [records.has_batch(tmp_path, step) for step in (1, 2, 3)] == [False, True, True]
    assert records.read_step(tmp_path, 1).num_updates == 2
    with pytest.raises(
        RecordError, match=r"no batch of rollout step 1 \(observe.record_keep\); those of steps 2, 3 are"
    ):
        records.read_batch(tmp_path, 1)


def test_what_is_missing_or_damaged_is_told(tmp_path):
    with pytest.raises(RecordError, match=r"no record of rollout step 1; it was not run with observe.record true"):
        records.read_step(tmp_path, 1)
    with pytest.raises(RecordError, match="no record of a start before rollout step 1"):
        records.read_start(tmp_path, 1)
    records.write_step(tmp_path, step_record(1), records.write_batch(tmp_path, 1, batch_record()))
    with pytest.raises(RecordError, match="it has those of 1 steps from 1 to 1"):
        records.read_step(tmp_path, 2)


def test_a_record_of_another_version_is_told(tmp_path):
    records.write_step(tmp_path, step_record(1))
    folder = tmp_path / "record/step_000001"
    content = json.loads((folder / "step.json").read_bytes())
    for other, told in (
        ({**content, "num_updates": "2"}, "num_updates: Input should be a valid integer"),
        ({name: value for name, value in content.items() if name != "plan"}, "plan: Field required"),
    ):
        (folder / "step.json").write_text(json.dumps(other))
        write_manifest(folder, [folder / "step.json"], {})
        with pytest.raises(RecordError, match=f"{told}; another version wrote it: use that one"):
            records.read_step(tmp_path, 1)


def test_one_flipped_bit_in_any_file_of_a_record_is_noticed(tmp_path):
    records.write_start(tmp_path, StartRecord(0, 0, SETTING, {"w": DIGEST}), "name: run\n")
    records.write_step(tmp_path, step_record(1), records.write_batch(tmp_path, 1, batch_record()))
    readers = {
        "start_000000/start.json": lambda: records.read_start(tmp_path, 1),
        "start_000000/config.yaml": lambda: records.config_path(tmp_path, 0),
        "step_000001/step.json": lambda: records.read_step(tmp_path, 1),
        "step_000001/batch.safetensors": lambda: records.read_batch(tmp_path, 1),
    }
    for name, read in readers.items():
        path = tmp_path / "record" / name
        whole = path.read_bytes()
        for place in range(0, len(whole), max(1, len(whole) // 50)):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(RecordError, match=rf"{path.name} is changed: its SHA-256 .*; copy it again from where"):
                read()
        path.write_bytes(whole)
        for damaged in (path, path.with_name("manifest.json")):
            content = damaged.read_bytes()
            damaged.write_bytes(content[:-1])
            with pytest.raises(RecordError, match=rf"{damaged.name} is (truncated|damaged): .*; copy it again"):
                read()
            damaged.write_bytes(content)
        read()


def test_a_batch_takes_nine_bytes_for_each_token(tmp_path):
    small = batch_record()
    count = 100_000
    flat = replace(
        small.batch,
        tokens=np.zeros(count, np.int32),
        loss_mask=np.ones(count, bool),
        rollout_logprobs=np.zeros(count, np.float32),
    )
    sizes = [file_size(records.write_batch(tmp_path, 1, BatchRecord(b, small.origins))) for b in (small.batch, flat)]
    assert sizes[1] - sizes[0] == pytest.approx(9 * (count - len(small.batch.tokens)), abs=100)


def file_size(folder: Path) -> int:
    return (folder / "batch.safetensors").stat().st_size
