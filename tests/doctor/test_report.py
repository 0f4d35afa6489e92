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


def test_the_worst_is_first_one_line_each_with_its_remedy_and_the_verdict_is_last(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_report(Report("run.yaml", GROUPS, {}))
    assert capsys.readouterr().out.splitlines() == [
        "✗ wrong: a run cannot start, or fails later",
        f"  cuDNN  {'two ' * 30}copies → export LD_PRELOAD=/x",
        "! odd: a run may be slow or fail; look at it",
        "  clock  odd → chrony",
        "– not in use: something slower does the work, or nothing needs it",
        "  Ray    not installed → pip install ray",
        "✓ in order",
        "  torch  2.11.0",
        "✗ run.yaml cannot run here, for 1 reason.",
    ]


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
