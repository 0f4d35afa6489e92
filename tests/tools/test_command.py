"""`dapo-mcore tool`: what it prints, its exit status, and its errors."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from dapo_mcore.cli import main
from tests.tools.sandbox.boxes import skip_without_sandbox

ZOO = Path(__file__).with_name("tool_zoo.py")


def test_a_call_of_the_calculator_from_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.stdin", io.StringIO('{"expression": "6 * 7"}'))
    assert main(["tool", "calculator"]) == 0
    out, err = capsys.readouterr()
    assert out == "42\n" and err.startswith("# ok, ")


def test_python_runs_in_the_sandbox(capsys: pytest.CaptureFixture[str]):
    skip_without_sandbox()
    assert main(["tool", "python", "--call", "open('/etc/passwd')"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Traceback") and out.endswith("Error: [Errno 2] No such file or directory: '/etc/passwd'\n")
    assert err.startswith("# error, ") and " ms of CPU" in err


def test_a_configurations_own_tool(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: {path: m}\ndata: {files: [d.jsonl]}\ntools:\n"
        f"  - {{name: say, function: '{ZOO}:act', parameters: {{type: object, properties: {{query: {{type: string}}}}}}}}\n"
    )
    assert main(["tool", "say", "--config", str(file), "--call", "x"]) == 0
    assert main(["tool", "say", "--config", str(file), "--call", "away down"]) == 1
    out, err = capsys.readouterr()
    assert out == "did x\nToolUnavailable: down\n" and "# infrastructure, " in err
    assert main(["tool", "other", "--config", str(file), "--call", "x"]) == 2
    assert f"{file} has no tool 'other'; its tools are: say" in capsys.readouterr().err


def test_a_file_needs_no_other_sections_and_those_it_has_are_not_checked(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    file = tmp_path / "tools.yaml"
    file.write_text("tools: [{name: sum, function: calculator}]\ndata: {fils: 3}\n")
    command = ["tool", "sum", "--config", str(file), "--call", "6 * 7"]
    assert main(command) == 0
    assert main([*command, "ray.adress=here"]) == 2
    file.write_text("tools: [{name: sum, function: calculator}, {name: sum, function: python}]\n")
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert out == "42\n"
    assert "dapo-mcore tool: unknown key 'ray.adress'; did you mean 'ray.address'?\n" in err
    assert "dapo-mcore tool: tools: the name 'sum' occurs 2 times; each tool needs its own\n" in err


def test_a_json_object_is_the_arguments_as_in_a_run(capsys: pytest.CaptureFixture[str]):
    assert main(["tool", "calculator", "--call", '{"expr": "1+1"}']) == 0
    out, err = capsys.readouterr()
    assert out.startswith("the arguments do not fit calculator: ") and err.startswith("# error, ")


def test_a_missing_call_is_no_empty_one(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["tool", "calculator"]) == 2
    assert "dapo-mcore tool: no call was given: use --call" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["pythn"], "there is no tool 'pythn'; built in are python and calculator"),
        (["python", "seed=1"], "seed=1 changes a configuration, but none is given: add --config FILE"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str):
    assert main(["tool", *arguments, "--call", "1"]) == 2
    assert reason in capsys.readouterr().err
