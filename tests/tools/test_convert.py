"""The command line of tools/convert.py: each command once in its own process, wrong calls in this process."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fake_hub import fake_hub
from tests.model_files.character_model import write_tokenizer
from tests.model_files.zoo import save_model

CONVERT = Path(__file__).parents[2] / "tools" / "convert.py"
TEXT = "Solve 12+345=; the Answer: x.\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 model with a vocabulary of 101, which has room for the tokenizer of characters."""
    path = save_model(tmp_path_factory.mktemp("convert") / "hf", "qwen2")
    write_tokenizer(path, eos_token="<eos>")
    return path


@pytest.fixture(scope="module")
def megatron_folder(folder: Path) -> Path:
    """The same model as hf-to-mcore writes it for two tensor-parallel ranks and two stages."""
    out = folder.with_name("mcore")
    done = convert("hf-to-mcore", folder, out, "--tensor-parallel", "2", "--pipeline-parallel", "2")
    assert (done.returncode, done.stdout) == (0, f"wrote {out}; train from it with model.path={out}\n"), done.stderr
    assert re.search(r"^hf-to-mcore: 0\.00 of 0\.00 GB, .* s left$", done.stderr, re.MULTILINE)
    return out


def convert(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CONVERT), *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment, check=False)


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    """The script as a module. Its changes to the process (environment, paths, logging) are undone at the end."""
    spec = importlib.util.spec_from_file_location("convert_tool", CONVERT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before, path = dict(os.environ), list(sys.path)
    with warnings.catch_warnings():
        spec.loader.exec_module(module)
        yield module
    logging.disable(logging.NOTSET)
    os.environ.clear()
    os.environ.update(before)
    sys.path[:] = path


def test_a_conversion_and_back_gives_the_same_tensors(folder: Path, megatron_folder: Path, tmp_path: Path) -> None:
    done = convert("mcore-to-hf", megatron_folder, tmp_path / "back", "--shard-size", "0.00003")
    assert done.returncode == 0 and done.stdout == f"wrote {tmp_path / 'back'}, a folder for transformers and SGLang\n"
    expected = load_file(folder / "model.safetensors")
    files = sorted((tmp_path / "back").glob("model-*.safetensors"))
    found = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert len(files) > 1 and found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_verify_with_logits_and_a_manifest(folder: Path, megatron_folder: Path, tmp_path: Path) -> None:
    """transformers and Megatron differ only by rounding in float32."""
    done = convert("verify", folder, megatron_folder, "--text", TEXT, "--manifest", tmp_path / "manifest.json")
    assert done.returncode == 0, done.stdout + done.stderr
    same, logits = done.stdout.splitlines()
    assert same == "the same: 39 tensors, bit for bit"
    found = re.fullmatch(
        rf"logits on {len(TEXT)} tokens in float32: largest difference (\S+) \(largest logit (\S+)\), "
        rf"same best token at {len(TEXT)} of {len(TEXT)}",
        logits,
    )
    assert found and 0 < float(found[1]) < 1e-5 * float(found[2])
    stored = json.loads((tmp_path / "manifest.json").read_bytes())
    assert list(stored) == [str(folder), str(megatron_folder)]
    assert stored[str(folder)] == stored[str(megatron_folder)] and len(stored[str(folder)]) == 39
    entry = stored[str(folder)]["model.norm.weight"]
    assert (entry["shape"], entry["dtype"], len(entry["sha256"])) == ([32], "float32", 64)


def flipped(folder: Path, out: Path) -> Path:
    """Return a copy in which the lowest bit of the model's last number is changed."""
    shutil.copytree(folder, out)
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-4] ^= 1
    (out / "model.safetensors").write_bytes(data)
    return out


def test_verify_finds_a_single_bit(folder: Path, megatron_folder: Path, tmp_path: Path) -> None:
    done = convert("verify", megatron_folder, flipped(folder, tmp_path / "flipped"))
    assert done.returncode == 1
    line, count = done.stdout.splitlines()
    assert re.fullmatch(
        r"model\.norm\.weight: \[32\] float32 \w{12} in the first, \[32\] float32 \w{12} in the second", line
    )
    assert count == "1 of 39 tensors differ"


def test_inspect(folder: Path, megatron_folder: Path) -> None:
    done = convert("inspect", megatron_folder, "--tensors")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0] == f"{megatron_folder}: a Megatron distributed checkpoint"
    assert len([line for line in lines if line.startswith("  model.") or line.startswith("  lm_head.")]) == 39


def test_a_model_of_the_hub_is_a_folder_here(
    folder: Path, tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with fake_hub({"models/Org/Tiny": files}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.chdir(tmp_path)
        assert tool.main(["hf-to-mcore", "Org/Tiny@v1", "mcore"]) == 0
        assert tool.main(["verify", str(folder), "mcore"]) == 0
    assert "the same: " in capsys.readouterr().out


def test_help_names_every_command_and_option(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    parser = tool.build_parser()
    (commands,) = (action.choices for action in parser._actions if action.dest == "command")
    assert list(commands) == ["hf-to-mcore", "mcore-to-hf", "verify", "inspect"]
    text = parser.format_help()
    assert all(name in text for name in commands)
    assert f"tools/{CONVERT.name} hf-to-mcore Qwen2.5-32B" in text
    for name, command in commands.items():
        with pytest.raises(SystemExit) as ended:
            tool.main([name, "--help"])
        shown = capsys.readouterr().out
        assert ended.value.code == 0
        for action in command._actions:
            assert action.help, (name, action.dest)
            assert all(option in shown for option in action.option_strings)
            assert max(map(len, shown.splitlines())) <= 120


def wrong(tool: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the message of a wrong call, which must end with status 2. argparse raises SystemExit with it."""
    try:
        status = tool.main([str(argument) for argument in arguments])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err and "wrote" not in printed.out
    return printed.err


def test_wrong_input_ends_with_status_2(
    tool: ModuleType, folder: Path, megatron_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    cases = {
        ("hf-to-mcore", tmp_path / "absent", out): r"^hf-to-mcore: .*absent is not a folder; give a Hugging Face",
        ("hf-to-mcore", folder, out, "--tensor-parallel", 3): "--tensor-parallel 3 does not divide num_attention_heads 4",
        ("hf-to-mcore", folder, folder): r"hf exists; give another folder",
        ("hf-to-mcore", megatron_folder, out): "is a Megatron checkpoint already",
        ("mcore-to-hf", folder, out): "^mcore-to-hf: .* holds no Megatron checkpoint",
        ("verify", folder, tmp_path): r"^verify: .* holds no model: no config\.json in it",
        ("inspect", tmp_path): r"^inspect: .* holds no model: no config\.json in it",
        ("hf-to-mcore", folder, out, "--tensor-parallel", 0): "0 must be at least 1",
        ("hf-to-mcore", folder, out, "--tensor-parallel", "two"): "invalid .* value: 'two'",
        ("mcore-to-hf", megatron_folder, out, "--shard-size", "-1"): "-1 must be a size above 0",
        ("mcore-to-hf", megatron_folder, out, "--shard-size", "nan"): "nan must be a size above 0",
        ("mcore-to-hf", megatron_folder, out, "--shard-size", "inf"): "inf must be a size above 0",
        ("hf-to-mcore", folder): "the following arguments are required: OUT",
        ("convert", folder): "invalid choice: 'convert'",
        (): "the following arguments are required: COMMAND",
    }  # fmt: skip
    for arguments, told in cases.items():
        assert re.search(told, wrong(tool, capsys, *arguments), re.MULTILINE), arguments
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_made_is_an_error(
    tool: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert "Not a directory" in wrong(tool, capsys, "hf-to-mcore", folder, tmp_path / "file" / "out")


def test_differences_beyond_twenty_are_counted(
    tool: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "other")
    state = {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(state, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    assert tool.main(["verify", str(folder), str(tmp_path / "other")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 22 and lines[-2:] == ["… and 19 more", "39 of 39 tensors differ"]
