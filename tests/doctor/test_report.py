from __future__ import annotations

import json
from pathlib import Path

import pytest

from dapo_mcore.doctor.finding import fallback, hint, ok, wrong
from dapo_mcore.doctor.report import Report, print_report, write_json
from dapo_mcore.errors import OutputError

GROUPS = {
    "Packages": [ok("torch", "2.11.0"), fallback("Ray", "not installed", "pip install ray")],
    "Machine": [hint("clock", "odd", "chrony"), wrong("cuDNN", "two " * 30 + "copies", "export LD_PRELOAD=/x")],
}


def test_the_table_has_marks_words_and_remedies_in_100_columns(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(Report("run.yaml", GROUPS, {}))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "Packages " + 91 * "─"
    assert lines[1] == "✓ ok          torch               2.11.0"
    assert lines[2] == "– falls back  Ray                 not installed"
    assert lines[3] == "                                  → pip install ray"
    assert "– hint        clock               odd" in lines
    assert max(len(line) for line in lines[:-2]) <= 100
    assert lines[-2] == "✗ run.yaml cannot run here, for 1 reason:"
    assert lines[-1] == f"  1. cuDNN: {'two ' * 30}copies; export LD_PRELOAD=/x", (
        "a reason is one line, to be searched for"
    )


def test_hints_and_fallbacks_stand_in_nobodys_way(capsys: pytest.CaptureFixture[str]) -> None:
    sound = {name: findings[:1] for name, findings in GROUPS.items()}
    print_report(Report("run.yaml", sound, {}))
    assert capsys.readouterr().out.rstrip().endswith("✓ run.yaml can run here.")
    assert Report(None, sound, {}).verdict == "✓ Nothing stands in the way of a run here."


def test_the_json_file_has_the_same_findings(tmp_path: Path) -> None:
    write_json(Report("run.yaml", GROUPS, {"host": "node0"}), tmp_path / "doctor.json")
    content = json.loads((tmp_path / "doctor.json").read_text())
    assert (content["config"], content["can_run"], content["host"], len(content["findings"])) == (
        "run.yaml",
        False,
        "node0",
        4,
    )
    assert content["findings"][1] == {
        "group": "Packages",
        "name": "Ray",
        "state": "falls back",
        "detail": "not installed",
        "remedy": "pip install ray",
    }
    with pytest.raises(OutputError, match="name a file in a folder"):
        write_json(Report(None, GROUPS, {}), tmp_path / "nowhere" / "doctor.json")
