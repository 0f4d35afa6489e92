"""`dapo-mcore import` as a user runs it: exit codes, files, and a run of what it writes."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dapo_mcore.cli import main
from dapo_mcore.config.file import load_config
from tests.foreign.scripts import ADDITION
from tests.train.runs import ROOT, metrics, python

HERE = [
    "model.path=runs/arithmetic/model", "model.init=random", "model.dtype=fp32", "model.recompute=none", "rollout.engine=embedded",
    "parallel.tensor_parallel=1", "reward.function=math_dapo", "data.files=[runs/arithmetic/train.jsonl]", "data.answer_key=answer",
    "data.source_key=null", "data.chat_template=false", "data.add_bos=true", "eval.sets.heldout.answer_key=answer",
    "eval.sets.heldout.files=[runs/arithmetic/heldout.jsonl]", "eval.sets.heldout.source_key=null",
    "eval.sets.heldout.chat_template=false", "eval.sets.heldout.add_bos=true", "observe.plot_at_end=false",
]  # fmt: skip
"""The quickstart's model and data, and the engine of this machine."""
WARM = (
    "warm_start={files: [runs/arithmetic/demonstrations.jsonl], batch_size: 128, max_updates: 600, lr: 3.0e-3, stop_at: 0.25, "
    "check_every: 10, choose: {files: [runs/arithmetic/choose.jsonl], answer_key: answer, source_key: null, add_bos: true, "
    "max_prompt_tokens: 8}}"
)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "addition.sh"
    path.write_text(ADDITION, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data and model of the quickstart, and the imported script, in a folder of its own."""
    folder = tmp_path_factory.mktemp("task")
    command = [sys.executable, str(ROOT / "examples/arithmetic.py"), "--out", "runs/arithmetic"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    (folder / "addition.sh").write_text(ADDITION, encoding="utf-8")
    assert main(["import", "verl", str(folder / "addition.sh"), "-o", str(folder / "addition.yaml")]) == 0
    return folder


def test_the_yaml_goes_to_a_file_and_the_report_to_the_screen(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run.yaml"
    assert main(["import", "verl", str(script), "-o", str(out)]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("addition.sh: 27 settings of verl: ") and shown.err == ""
    assert "0 lost\n" in shown.out and ": 1 to decide.\n" in shown.out
    assert f"Next: dapo-mcore config --only-values {out}" in shown.out
    config = load_config(out, ["parallel.tensor_parallel=1"])
    assert (config.num_rollout_steps, config.batch.mini_batch_prompts, config.eval.samples_per_prompt) == (60, 8, 8)
    assert config.algo.kl.coef == 0 and config.optimizer.lr == 3e-4
    assert main(["import", "verl", str(script), "-o", str(out)]) == 2, "a file is never overwritten"
    assert f"{out} exists" in capsys.readouterr().err


def test_without_a_file_the_yaml_goes_to_standard_output(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "verl", str(script)]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("# addition.sh in the words of dapo_mcore") and "settings of verl" in shown.err


def test_nothing_is_executed_and_nothing_secret_is_copied(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = Path("/tmp/dapo_mcore_import_ran")
    assert not trace.exists()
    main(["import", "verl", str(script)])
    shown = capsys.readouterr()
    assert not trace.exists() and "not-to-be-copied" not in shown.out + shown.err


def test_a_lost_objective_ends_with_status_3_until_it_is_accepted(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.write_text(ADDITION.replace("adv_estimator=grpo", "adv_estimator=remax"), encoding="utf-8")
    out = tmp_path / "run.yaml"
    assert main(["import", "verl", str(script), "-o", str(out)]) == 3
    assert "nothing is written" in capsys.readouterr().err and not out.exists()
    assert main(["import", "verl", str(script), "-o", str(out), "--accept", "algorithm.adv_estimator"]) == 0
    assert "# Lost: algorithm.adv_estimator." in out.read_text(encoding="utf-8")
    assert main(["import", "verl", str(script), "--accept", "algorithm.estimator"]) == 2
    assert "--accept algorithm.estimator: this is no lost setting" in capsys.readouterr().err


def test_a_file_that_is_no_script_of_verl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.sh"
    path.write_text("echo hello\n", encoding="utf-8")
    assert main(["import", "verl", str(path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_imported_script_trains_with_the_overrides_of_the_page(task: Path) -> None:
    """The model and data of the quickstart in place of its own; the quickstart's data are in the folder."""
    page = (ROOT / "examples/from_verl.md").read_text(encoding="utf-8")
    block = re.search(r"-m dapo_mcore.train my_run.yaml (.+?)```", page, re.DOTALL)
    assert block is not None
    done = python(task, "-m", "dapo_mcore.train", "addition.yaml", *shlex.split(block[1].replace("\\\n", "")))
    assert done.returncode == 0, done.stdout + done.stderr
    assert metrics(task, "try")[-1]["step"] == 3


@pytest.mark.slow
def test_an_imported_script_learns(task: Path) -> None:
    """From a quarter of right answers, which the warm start gives, to most of them."""
    done = python(task, "-m", "dapo_mcore.train", "addition.yaml", *HERE, WARM, "name=learns")
    assert done.returncode == 0, done.stdout + done.stderr
    right = [row["val/heldout/mean@8"] for row in metrics(task, "learns") if "val/heldout/mean@8" in row]
    print(right)
    assert right[-1] > right[0] + 0.2 and right[-1] > 0.5, right


def test_no_value_of_the_environment_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("MODEL", "HOME", "NNODES", "WANDB_KEY"):
        monkeypatch.setenv(name, "s3cr3t")
    script = tmp_path / "run.sh"
    script.write_text(
        f"export TOKEN=$WANDB_KEY\ntouch {tmp_path}/touched\npython3 -m verl.trainer.main_ppo algorithm.adv_estimator=grpo "
        "actor_rollout_ref.model.path=$MODEL/x actor_rollout_ref.rollout.n=8 data.train_files=$HOME/$(whoami).parquet trainer.nnodes=$NNODES "
        "+trainer.wandb_key=$TOKEN +trainer.api_key=literal-s3cr3t\n"
    )
    main(["import", "verl", str(script), "-o", str(tmp_path / "run.yaml")])
    shown = capsys.readouterr()
    written = (tmp_path / "run.yaml").read_text()
    assert "s3cr3t" not in shown.out + shown.err + written
    assert "NNODES" in shown.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.sh", "run.yaml"]


def test_where_the_yaml_goes_is_checked_before_the_report(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out, message in ((tmp_path / "no" / "run.yaml", "there is no folder"), (script, "exists; name another file")):
        assert main(["import", "verl", str(script), "-o", str(out)]) == 2
        shown = capsys.readouterr()
        assert message in shown.err and shown.out == ""


def test_a_run_of_another_framework_is_named(script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "slime", str(script)]) == 2
    assert f"it is a run of verl: dapo-mcore import verl {script}" in capsys.readouterr().err
    other = tmp_path / "other.sh"
    other.write_text("echo hello\n", encoding="utf-8")
    assert main(["import", "slime", str(other)]) == 2
    assert "import verl" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["empty.sh", "empty.yaml"])
def test_an_empty_file_is_called_empty(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_text("\n", encoding="utf-8")
    assert main(["import", "verl", str(tmp_path / name)]) == 2
    assert "is empty; give the path of a script or configuration" in capsys.readouterr().err
