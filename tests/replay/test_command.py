"""What a replay tells. Whole replays: test_replay.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dapo_mcore.config.file import dump_config
from dapo_mcore.errors import RecordError
from dapo_mcore.replay import command
from dapo_mcore.replay.compare import Check, Verdict
from dapo_mcore.replay.record import Setting
from tests.actor.parity import Mesh, make_config

EQUAL = Check("plan", Verdict.EQUAL, "2 mini-batches")
ROUNDED = [
    Check(name, Verdict.ROUNDING, "", size=size) for name, size in (("update 1: gradient", 1e-7), ("weights", 3e-6))
]
BROKEN = Check("update 2: gradient", Verdict.DIFFERS, "decoder.layers.3.w, norm 1 against 2")


@pytest.mark.parametrize(
    ("checks", "status", "told"),
    [
        ([EQUAL, EQUAL], 0, "step 7: bitwise the same as recorded (2 comparisons)"),
        (
            [EQUAL, *ROUNDED],
            0,
            "step 7: the same within rounding; largest difference 3.0e-06 in weights, and 1e-04 is allowed",
        ),
        ([*ROUNDED, BROKEN], 1, "step 7: differs, first in update 2: gradient: decoder.layers.3.w, norm 1 against 2"),
        ([], 0, "step 7: not recorded, so not compared"),
    ],
)
def test_a_step_is_told_in_a_line_by_its_worst_check(checks, status, told):
    lines = []
    assert command._report(7, checks, lines.append, 1e-4) == status
    assert len(lines) == 1 and lines[0].startswith(told)


def test_causes_are_what_differs_from_the_recorded_start(tmp_path, capsys):
    config = make_config(Mesh())
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    recorded = Setting({"tensor": 1}, {"torch": "2.13"}, {"cpu": 1}, {"NCCL_ALGO": "Ring"})
    command._tell_causes(
        recorded, replace(recorded, versions={"torch": "2.12"}), path, make_config(Mesh(), optimizer__lr=0.5)
    )
    assert capsys.readouterr().out.splitlines() == [
        "  optimizer.lr: 0.001 when it was recorded, 0.5 here",
        "  versions.torch: 2.13 when it was recorded, 2.12 here",
    ]
    command._tell_causes(recorded, recorded, path, config)
    output = capsys.readouterr().out
    assert "are as recorded: a file has changed, or the hardware" in output and "deterministic is false" in output


def test_a_replay_writes_beside_the_run_and_never_over_records(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run, other, tmp_path / "run.replay"):
        (folder / "record").mkdir(parents=True)
    told = []
    assert command._out(run, None, told.append) == tmp_path / "run.replay"
    assert not (tmp_path / "run.replay/record").exists()
    assert told == [f"the records of an earlier replay in {tmp_path}/run.replay are replaced; --out FOLDER keeps both"]
    assert command._out(run, tmp_path / "new", pytest.fail) == tmp_path / "new"
    for refused in (other, run, run / "below"):
        with pytest.raises(RecordError, match=r"choose a(nother)? folder"):
            command._out(run, refused, pytest.fail)
    assert (run / "record").exists() and (other / "record").exists()
