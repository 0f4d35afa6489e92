"""The command line: what it prints, its exit codes, and that it starts without heavy imports."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dapo_mcore.cli import COMMANDS, main
from dapo_mcore.config.file import load_config
from dapo_mcore.train.__main__ import main as train

CONFIG = "model: {path: model}\ndata: {files: [train.jsonl]}\n"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return path


def test_config_prints_a_file_that_reads_back_to_the_same_configuration(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "--only-values", str(config), "optimizer.lr=1e-5", "name=x"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "printed.yaml") == load_config(config, ["optimizer.lr=1e-5", "name=x"])


def test_overrides_may_follow_an_option(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", str(config), "name=x", "--only-values", "optimizer.lr=1e-5", "seed=3"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["name"], printed["optimizer"]["lr"], printed["seed"]) == ("x", 1e-5, 3)
    with pytest.raises(SystemExit):
        main(["config", str(config), "--only-values", "optimizer.lr=1e-5", "--procesess"])
    assert "unrecognized arguments: --procesess" in capsys.readouterr().err


@pytest.mark.parametrize("program", [lambda words: main(["config", *words]), train], ids=["config", "train"])
def test_a_flag_of_another_framework_is_answered_with_our_key(program, capsys):
    with pytest.raises(SystemExit) as ended:
        program(["examples/quickstart.yaml", "--rollout-batch-size", "32"])
    told = "--rollout-batch-size is slime's name for sampling.train_batch_prompts (prompts per rollout step); write "
    assert ended.value.code == 2 and f"{told}sampling.train_batch_prompts=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--only-values"], ["--run-dir"]], ids=["more than the pipe's buffer", "less"])
def test_a_reader_that_goes_away_ends_a_command_quietly(
    config: Path, monkeypatch: pytest.MonkeyPatch, arguments
) -> None:
    """As in `dapo-mcore explain A B | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert main(["config", str(config), *arguments]) == 141


SHARED_SERVERS = (
    "rollout.engine=sglang",
    "rollout.sglang.num_servers=5",
    "rollout.sglang.colocated=true",
    "rollout.sglang.sync=tensor",
)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["config", "CONFIG", "--only-values", "--processes=6", "parallel.tensor_parallel=4"],
            "world size 6 is not a multiple of tensor_parallel 4",
        ),
        (
            ["config", "CONFIG", "--only-values", "--processes=4", *SHARED_SERVERS],
            "num_servers 5 × tensor_parallel 1 = 5 GPUs, but the trainer has 4 to share",
        ),
        (["config", "CONFIG", "algo.clip_hi=1"], "did you mean 'algo.clip_high'"),
        (["config", "nowhere.yaml"], "no configuration file at nowhere.yaml"),
        (["plot", "nowhere"], "no metrics.jsonl in nowhere"),
        (["plot"], "name the folder of a run, or give --bench"),
        (["plot", "--bench", "nowhere.json"], "nowhere.json is no benchmark JSON"),
        (
            ["reward-explain", "--answer", "1", "--text", "x", "--function", "nonsense"],
            "neither math_dapo, gsm8k, math_boxed, math_verify, by_source nor",
        ),
        (["reward-explain", "--answer", "1", "--transcript", ""], "--transcript is not valid JSON"),
        (
            ["reward-explain", "--answer", "1", "--text", "x", "--transcript", '{"turns": ["x"]}'],
            "--text and --transcript are two ways to give the response; leave one out",
        ),
    ],
)
def test_a_users_error_is_one_message_and_exit_code_2(
    argv: list[str], message: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(config) if arg == "CONFIG" else arg for arg in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"dapo-mcore {argv[0]}: ")
    assert message in err
    assert "Traceback" not in err


def test_plot_prints_the_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "actor/loss": 0.5}\n')
    assert main(["plot", str(tmp_path / "a")]) == 0
    out = tmp_path / "both.png"
    assert main(["plot", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "a" / "plot.png"), str(out)]
    assert out.is_file()


def test_reward_explain_reads_the_response_from_standard_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("so\nAnswer: 7\n"))
    assert main(["reward-explain", "--answer", "7"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[5:7] == ["  score       +1 (right)", ""] and shown[7].startswith("math_verify, for comparison")
    assert main(["reward-explain", "--answer", "7", "--text", "\\boxed{8}", "--strict-box"]) == 0
    assert capsys.readouterr().out.splitlines()[5] == "  score       -1 (wrong)"


def test_reward_explain_gives_the_row_to_the_function(capsys: pytest.CaptureFixture[str]) -> None:
    zoo = Path(__file__).parent / "reward" / "plugin_zoo.py"
    row = '{"prompt": [{"role": "user", "content": "3 + 4?"}], "solution": "7"}'
    argv = [
        "reward-explain",
        "--answer",
        "7",
        "--text",
        "so 7",
        "--function",
        f"{zoo}:trl_accuracy",
        "--adapter",
        "trl",
    ]
    assert main([*argv, "--row", row]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "  score       +1 (right)"


def test_every_subcommand_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit) as exit_:
            main([command.name, "--help"])
        assert exit_.value.code == 0
        assert command.help in " ".join(capsys.readouterr().out.split())


def test_a_bare_call_and_an_unknown_command_show_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["nonsense"]):
        with pytest.raises(SystemExit) as exit_:
            main(argv)
        assert exit_.value.code == 2
        assert "usage: dapo-mcore" in capsys.readouterr().err


def test_starting_imports_neither_torch_nor_matplotlib() -> None:
    code = "import sys, dapo_mcore.cli; print({'torch', 'matplotlib', 'megatron'} & set(sys.modules))"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True).stdout == "set()\n"


def test_ctrl_c_ends_a_command_without_a_traceback(monkeypatch: pytest.MonkeyPatch, config: Path) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dapo_mcore.cli.load_config", interrupted)
    assert main(["config", str(config)]) == 130
