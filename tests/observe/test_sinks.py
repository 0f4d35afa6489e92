"""metrics.jsonl survives a kill at any byte, and resuming forgets exactly the steps that are run again."""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dapo_mcore.config.sections import ObserveConfig
from dapo_mcore.errors import ConfigError, DataError
from dapo_mcore.observe.sinks import MetricSinks, check_services, check_wandb, json_line, read_metrics

JSONL_ONLY = ObserveConfig(tensorboard=False)


def write_steps(run_dir: Path, steps: range, resume_step: int | None = None) -> None:
    with MetricSinks(run_dir, JSONL_ONLY, resume_step) as sinks:
        for step in steps:
            sinks.write(step, {"reward/mean": step / 10})


def test_lines_start_with_the_step_and_read_back(tmp_path: Path) -> None:
    write_steps(tmp_path / "run", range(1, 3))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"step": 1, "reward/mean": 0.1}', '{"step": 2, "reward/mean": 0.2}']
    assert read_metrics(tmp_path / "run") == [{"step": 1, "reward/mean": 0.1}, {"step": 2, "reward/mean": 0.2}]


def test_a_line_is_readable_before_the_run_ends(tmp_path: Path) -> None:
    sinks = MetricSinks(tmp_path, JSONL_ONLY)
    sinks.write(1, {"a": 1.0})
    assert read_metrics(tmp_path) == [{"step": 1, "a": 1.0}]
    sinks.close()


def test_metrics_of_an_older_version_read_under_their_names_of_today(tmp_path: Path) -> None:
    old = {"step": 1, "response_length/truncated_ratio": 0.5, "val/a/truncated_ratio": 0.25, "tis/truncated_ratio": 0.1}
    (tmp_path / "metrics.jsonl").write_text(json_line(old))
    new = {"step": 1, "response_length/clip_ratio": 0.5, "val/a/clip_ratio": 0.25, "tis/truncated_ratio": 0.1}
    assert read_metrics(tmp_path) == [new]


def test_what_json_lacks_is_null_and_reads_as_nan(tmp_path: Path) -> None:
    with MetricSinks(tmp_path, JSONL_ONLY) as sinks:
        sinks.write(1, {"a": math.nan, "b": math.inf, "c": np.float32(0.5), "d": np.int64(3)})
    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert record == {"step": 1, "a": None, "b": None, "c": 0.5, "d": 3.0}
    assert math.isnan(read_metrics(tmp_path)[0]["b"])


def test_resuming_drops_later_steps_only_and_says_so(tmp_path: Path) -> None:
    write_steps(tmp_path, range(0, 6))
    told: list[str] = []
    with MetricSinks(tmp_path, JSONL_ONLY, 3, told.append) as sinks:
        sinks.write(4, {"a": 1.0})
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]
    for step in (3, 4):
        MetricSinks(tmp_path, JSONL_ONLY, step, told.append).close()
    assert told == [
        f"rollout {steps} will be done again: the checkpoint is older" for steps in ("steps 4 to 5", "step 4")
    ]


def test_a_fresh_run_starts_empty(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 4))
    write_steps(tmp_path, range(1, 2))
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]


def test_a_file_cut_at_any_byte_reads_and_resumes(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        survivors = [step for step, end in enumerate(ends, start=1) if cut >= end - 1]
        assert [record["step"] for record in read_metrics(tmp_path)] == survivors
        write_steps(tmp_path, range(4, 5), resume_step=3)
        assert [record["step"] for record in read_metrics(tmp_path)] == [*survivors, 4]


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(DataError, match="line 2 of 3 is not JSON"):
        read_metrics(tmp_path)


def test_a_folder_without_metrics_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no metrics\.jsonl"):
        read_metrics(tmp_path)


def test_json_lines_keep_text_as_it_is() -> None:
    assert json_line({"text": "x² \u2028 \n"}) == '{"text": "x² \u2028 \\n"}\n'


def test_half_a_surrogate_pair_is_written_as_the_replacement_character() -> None:
    line = json_line({"whole": "\ud83d\ude00 é", "half": "a\ud83d", "other half": "\ude00b"})
    line.encode("utf-8")
    assert json.loads(line) == {"whole": "😀 é", "half": "a\ufffd", "other half": "\ufffdb"}


def test_tensorboard_holds_the_same_numbers(tmp_path: Path) -> None:
    with MetricSinks(tmp_path, ObserveConfig()) as sinks:
        sinks.write(1, {"reward/mean": 0.25})
        sinks.write(2, {"reward/mean": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 0.25), (2, 0.5)]


def test_tensorboard_forgets_the_steps_that_are_run_again(tmp_path: Path) -> None:
    for value, resume_step, steps in ((1.0, None, (1, 2, 3)), (2.0, 1, (2,))):
        with MetricSinks(tmp_path, ObserveConfig(), resume_step) as sinks:
            for step in steps:
                sinks.write(step, {"a": value})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("a")] == [(1, 1.0), (2, 2.0)]


@contextmanager
def files_no_longer_than(num_bytes: int) -> Iterator[None]:
    """Limit the size of files: a write beyond it fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_rows_that_the_disk_refuses_wait_for_room(tmp_path: Path) -> None:
    told: list[str] = []
    sinks = MetricSinks(tmp_path, JSONL_ONLY, tell=told.append)
    sinks.write(1, {"a": 1.0})
    with files_no_longer_than(25):  # the second row begins, and its beginning must go again
        sinks.write(2, {"a": 2.0})
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "a": 1.0}\n'
        sinks.write(3, {"a": 3.0})
    assert len(told) == 2 and told[0].startswith(f"warning: cannot write {tmp_path}/metrics.jsonl: File too large; ")
    sinks.write(4, {"a": 4.0})
    sinks.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_training_goes_on_without_tensorboard_when_its_file_cannot_grow(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked/tensorboard").touch()
    for folder in ("grows", "blocked"):
        sinks = MetricSinks(tmp_path / folder, ObserveConfig(), tell=told.append)
        with files_no_longer_than(200):
            sinks.write(1, {"a": 1.0, "b": 2.0} | {f"more/{i}": 1.0 for i in range(3)})
            sinks.write(2, {"a": 1.0})
        sinks.close()
        assert [row["step"] for row in read_metrics(tmp_path / folder)] == [1, 2]
    assert len(told) == 2 and all(line.startswith("warning: cannot write to TensorBoard: ") for line in told), told
    assert "Traceback" not in capsys.readouterr().err


def test_wandb_without_a_key_is_told_instead_of_asking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    config = ObserveConfig(wandb_project="p")
    with pytest.raises(
        ConfigError, match="wandb has no API key: run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline"
    ):
        check_services(config)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret")
    check_services(config)
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_services(config)


def test_wandb_missing_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"observe\.wandb_project is set, but wandb is not installed; pip install"):
        MetricSinks(tmp_path / "run", ObserveConfig(wandb_project="p"))
    assert not (tmp_path / "run").exists()


def test_wandb_gets_the_steps_and_a_resumed_run_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, float]] = []
    started: list[dict[str, str]] = []
    run = SimpleNamespace(define_metric=lambda *a, **k: None, log=logged.append, finish=lambda: None)
    fake = SimpleNamespace(init=lambda **options: started.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = ObserveConfig(tensorboard=False, wandb_project="p")
    for resume_step in (None, 1, None):
        with MetricSinks(tmp_path / "run", config, resume_step) as sinks:
            sinks.write(2, {"a": 1.0})
    ids = [options["id"] for options in started]
    assert logged[0] == {"rollout_step": 2, "a": 1.0}
    assert ids[0] == ids[1] != ids[2]
    assert (started[0]["project"], started[0]["name"]) == ("p", "run")


def test_wandb_without_a_key_is_told_and_offline_it_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = SimpleNamespace(api=SimpleNamespace(api_key=None))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(ConfigError, match="wandb has no API key; run `wandb login`, set WANDB_API_KEY"):
        check_wandb()
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_wandb()
    monkeypatch.delenv("WANDB_MODE")
    wandb.api.api_key = "key"
    check_wandb()
