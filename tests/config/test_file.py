"""Configuration files and overrides: how they are read, written back and recorded beside a run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dapo_mcore.config.file import dump_config, load_config, record_config, repeated_overrides
from dapo_mcore.config.schema import Config
from dapo_mcore.errors import ConfigError


def test_overrides_read_yaml_values_and_the_last_one_wins(file: Path) -> None:
    overrides = ["data.files=[a.jsonl, b.parquet]", "algo.dual_clip=10", "algo.dual_clip=null", "batch.packing=false"]
    config = load_config(file, overrides)
    assert config.data.files == ["a.jsonl", "b.parquet"]
    assert config.algo.dual_clip is None
    assert config.batch.packing is False


@pytest.mark.parametrize("override", ["algo.clip_high", "=3", "algo.clip_high 0.3"])
def test_an_override_without_key_or_value_is_refused(file: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"override {override!r} is not of the form section.key=value")):
        load_config(file, [override])


def test_a_value_that_is_still_to_decide_is_refused_in_a_list_too(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"still to decide \(now \?\?\?\): data.files, optimizer.lr; "):
        load_config(file, ["data.files=['???']", "optimizer.lr=???"])


def test_an_override_with_broken_yaml_is_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape("'data.files=[a'")):
        load_config(file, ["data.files=[a"])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"no configuration file at {tmp_path / 'no.yaml'}")):
        load_config(tmp_path / "no.yaml")


@pytest.mark.parametrize(("text", "message"), [("a: [1", "not valid YAML"), ("- 1\n- 2", "not a list")])
def test_a_file_that_holds_no_mapping_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "bad.yaml")


def test_every_bad_key_is_named_at_once(file: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(file, ["algo.clip_low=-1", "rollout.temperature=0", "algo.zzz=1"])
    text = str(error.value)
    assert "algo.clip_low is -1; set a finite number that is at least 0 and at most 1" in text
    assert "rollout.temperature is 0; set" in text
    assert "unknown key 'algo.zzz'" in text


def test_an_override_that_a_later_one_replaces_is_reported() -> None:
    assert repeated_overrides(["a.b=1", "a.bc=2", "a.b=3", "a={}"]) == [
        "a.b=1 is given, but a.b=3 comes after it and replaces it",
        "a.b=1 is given, but a={} comes after it and replaces it",
        "a.bc=2 is given, but a={} comes after it and replaces it",
        "a.b=3 is given, but a={} comes after it and replaces it",
    ]
    assert repeated_overrides(["a=1", "b=2", "a.c=1"]) == []


def test_the_dump_reads_back_to_the_same_configuration(file: Path, tmp_path: Path) -> None:
    config = load_config(file, ["optimizer.lr=1e-6", "algo.dual_clip=10", "megatron={a: 1}"])
    (tmp_path / "dump.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "dump.yaml") == config
    assert isinstance(config, Config)


def test_a_changed_configuration_keeps_the_earlier_file_beside_it(file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    kept = []
    for rate, step in ((1e-6, 0), (1e-6, 2), (2e-6, 4), (3e-6, 4), (4e-6, 6)):
        kept.append(record_config(load_config(file, [f"optimizer.lr={rate}"]), run, step))
    assert [path and path.name for path in kept] == [
        None, None, "config.step_000004.yaml", "config.step_000004.1.yaml", "config.step_000006.yaml",
    ]  # fmt: skip
    rates = [load_config(path).optimizer.lr for path in [*kept[2:], run / "config.yaml"]]
    assert rates == [1e-6, 2e-6, 3e-6, 4e-6]
    assert len(list(run.iterdir())) == 4
