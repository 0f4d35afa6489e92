"""Every command on every page runs: each is read from its page and checked against the program that it starts.

Change here: a new command that pages may show. Commands are the lines that are indented by four spaces, or in a bash block.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dapo_mcore import cli
from dapo_mcore.config.file import load_config
from dapo_mcore.doctor import command as doctor
from dapo_mcore.foreign.commands import import_run
from dapo_mcore.observe import bench_plots, plots
from dapo_mcore.replay import command as replay
from dapo_mcore.replay import report
from tests.tools.sandbox.boxes import skip_without_sandbox
from tools.soak import __main__ as soak

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for path in ROOT.rglob("README.md") if ".venv" not in path.parts)
PAGES += [ROOT / "examples/reliability.md", ROOT / "examples/from_verl.md"]
WORDS = (
    "torchrun",
    "python",
    "python3",
    "dapo-mcore",
    "pytest",
    "tools/",
    "pip",
    "OMP_NUM_THREADS",
    ".venv/",
    "sbatch",
)
STANDS_FOR_ONE_OF_YOURS = dict.fromkeys(("my.yaml", "my_run.yaml", "CONFIG.yaml"), "examples/gsm8k.yaml")


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of each command of a page, without variables before it and a remark after it."""
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    fenced = re.findall(r"```bash\n(.*?)```", text, re.S)
    indented = re.findall(r"^    (?! )(.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    for line in [line for block in fenced for line in block.splitlines()] + indented:
        for part in line.split(" && "):
            words = shlex.split(part, comments=" #" in part)
            while words and re.fullmatch(r"[A-Z_]+=\S+", words[0]):
                words = words[1:]
            if words and words[0].startswith(WORDS):
                yield [word.removeprefix(".venv/bin/") for word in words]


COMMANDS = [(page, words) for page in PAGES for words in commands(page)]


def check_train(words: list[str]) -> None:
    config, *overrides = words[words.index("dapo_mcore.train") + 1 :]
    load_config(ROOT / STANDS_FOR_ONE_OF_YOURS.get(config, config), overrides)


def check_tool(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Run a command that needs no files; of others, only parse the arguments."""
    command, arguments = words[1], [STANDS_FOR_ONE_OF_YOURS.get(word, word) for word in words[2:]]
    if command == "config":
        arguments.append("--only-values")
    if arguments[:1] == ["python"]:
        skip_without_sandbox()
    if command == "plan":
        models = json.loads((ROOT / "tests/architecture/hub_configs.json").read_text())
        model = models["Qwen2.5-32B" if "_32b" in arguments[0] else "Qwen2.5-1.5B"]
        (tmp_path / "config.json").write_text(json.dumps(model))
        arguments.append(f"model.path={tmp_path}")
    for module, name in ((plots, "plot_run"), (plots, "plot_runs"), (bench_plots, "plot_benches")):
        monkeypatch.setattr(module, name, lambda *given, **more: [ROOT])
    for module in (doctor, replay, report, import_run):
        monkeypatch.setattr(module, "run", lambda *given: 0)
    assert cli.main([command, *arguments]) == 0, capsys.readouterr().err


def check_convert(words: list[str]) -> None:
    spec = importlib.util.spec_from_file_location("convert_tool", ROOT / "tools/convert.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.build_parser().parse_args(words)


def check_job(words: list[str]) -> None:
    """Show what the job would do."""
    script = next(place for place, word in enumerate(words) if word.endswith(".slurm"))
    arguments = [STANDS_FOR_ONE_OF_YOURS.get(word, word) for word in words[script + 1 :] if word != "--dry-run"]
    environment = {**os.environ, "VENV": sys.prefix}
    subprocess.run([words[script], "--dry-run", *arguments], env=environment, check=True, capture_output=True)


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[" ".join(words)[:80] for _, words in COMMANDS])
def test_a_command_of_a_page_runs(page, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    program = words[0]
    if "dapo_mcore.train" in words:
        check_train(words)
    elif "dapo_mcore.cli" in words:
        check_tool(words[words.index("dapo_mcore.cli") :], monkeypatch, capsys, tmp_path)
    elif program == "dapo-mcore":
        check_tool(words, monkeypatch, capsys, tmp_path)
    elif program == "pytest" or words[1:3] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words if word.startswith("tests"))
    elif words[:2] == ["python", "tools/convert.py"]:
        check_convert(words[2:])
    elif words[:3] == ["python", "-m", "tools.soak"]:
        soak.build_parser().parse_args(words[3:])
    elif program in ("python", "python3") and words[1] != "-m":
        assert (ROOT / words[1]).is_file()
    elif any(word.endswith(".slurm") for word in words):
        check_job(words)
    elif program.startswith("tools/"):
        assert (ROOT / program).stat().st_mode & 0o100, f"{program} is not executable"
    else:
        assert words[:2] in (["pip", "install"], ["python3", "-m"]), f"{page}: no test knows {' '.join(words)}"


def test_pages_name_files_that_exist():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        linked = re.findall(r"\]\((?!http)([^)#]+)\)", text)
        named = re.findall(r"`((?:dapo_mcore|kernels|tests|tools|examples)/[\w./-]+)`", text)
        missing = [name for name in linked if not (page.parent / name).exists()]
        missing += [name for name in named if not (ROOT / name).exists()]
        assert not missing, f"{page.relative_to(ROOT)} names {missing}"
