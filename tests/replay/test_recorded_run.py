from __future__ import annotations

import pytest

from dapo_mcore.config.file import dump_config, load_config
from dapo_mcore.errors import RecordError
from dapo_mcore.replay.record import StartRecord, write_start
from dapo_mcore.replay.recorded_run import RecordedRun, changed_keys, read_settings, setting_differences
from tests.replay.planted import QUICKSTART, digest, setting, step_record, write_run


def test_a_step_finds_its_start_and_the_weights_that_it_began_with(tmp_path):
    path = write_run(tmp_path / "run")
    second = StartRecord(2, 4, setting(tensor=2), {"w": digest(9)})
    write_start(path, second, (path / "record/start_000000/config.yaml").read_text().replace("seed: 0", "seed: 5"))
    run = RecordedRun(path)
    assert run.starts_before(3) == [0, 2] and run.starts_before(2) == [0]
    assert [run.begins_at(step) for step in (1, 2, 3)] == [True, False, True]
    assert run.weights_before(2) == step_record(1).weights
    assert run.weights_before(3) == second.weights
    assert [run.settings(step)["seed"] for step in (2, 3)] == [0, 5]
    assert [run.settings(step)["layout"]["tensor"] for step in (2, 3)] == [1, 2]
    assert run.config(3).seed == 5


def test_settings_that_differ_are_named_with_their_sections():
    a = {"name": "a", "seed": 0, "eval": {"sets": {}, "every": 2}, "layout": {"tensor": 1}}
    b = {"name": "b", "seed": 0, "eval": {"sets": {"new": {"limit": 4}}, "every": 3}, "layout": {"tensor": 2}}
    assert [tuple(own) for own in setting_differences(a, b)] == [
        ("eval.sets", {}, None),
        ("eval.every", 2, 3),
        ("layout.tensor", 1, 2),
        ("eval.sets.new.limit", None, 4),
    ]


def test_changed_keys_are_named_and_a_damaged_configuration_names_none(tmp_path):
    before = tmp_path / "config.yaml"
    before.write_text(dump_config(load_config(QUICKSTART)))
    assert (
        changed_keys(before, load_config(QUICKSTART, ["checkpoint.resume=4", "seed=3"]))
        == " in seed, checkpoint.resume"
    )
    older = "".join(line for line in before.read_text().splitlines(True) if "rejection_divisor" not in line)
    before.write_text(older)
    assert changed_keys(before, load_config(QUICKSTART, ["seed=3"])) == " in seed"
    assert changed_keys(before, load_config(QUICKSTART)) == ""
    before.write_text("seed: [")
    assert changed_keys(before, load_config(QUICKSTART)) == ""


@pytest.mark.parametrize("content", [b"seed: [", b"just a text", b"\xff"])
def test_a_damaged_configuration_is_named(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(RecordError, match=r"config.yaml .*damaged"):
        read_settings(tmp_path / "config.yaml")
