"""The tools quickstart: its files are right and readable, and a few steps of it call the calculator."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from dapo_mcore.config.file import load_config
from dapo_mcore.config.schema import Config
from dapo_mcore.data.demonstrations import load_demonstrations
from dapo_mcore.data.prompts import load_prompts
from dapo_mcore.model_files.hf_config import check_tokenizer_fits, load_hf_config, load_tokenizer, stop_token_ids
from dapo_mcore.tools.calculator import calculate
from tests.train.runs import TRAIN

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("products")
    command = [sys.executable, EXAMPLES / "products.py", "--out", out]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    assert told.stdout.startswith(f"wrote {out}: model/, train.jsonl (")
    return out


@pytest.fixture(scope="module")
def config(task: Path) -> Config:
    overrides = [
        f"model.path={task}/model",
        f"data.files={task}/train.jsonl",
        f"eval.sets.heldout.files={task}/heldout.jsonl",
        f"warm_start.files={task}/demonstrations.jsonl",
        f"warm_start.choose.files={task}/choose.jsonl",
    ]
    return load_config(EXAMPLES / "tools_quickstart.yaml", overrides)


@pytest.fixture(scope="module")
def tokenizer(config: Config):
    return load_tokenizer(config.model)


def rows(task: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (task / f"{name}.jsonl").read_text().splitlines()]


def test_answers_are_products_and_the_splits_are_disjoint(task: Path):
    found = {name: rows(task, name) for name in ("train", "choose", "heldout")}
    assert all(row["answer"] == calculate(row["prompt"].rstrip("=")) for split in found.values() for row in split)
    prompts = [row["prompt"] for split in found.values() for row in split]
    assert len(prompts) == len(set(prompts))
    assert (len(found["choose"]), len(found["heldout"])) == (128, 128)


def test_demonstrations_guess_or_call_and_only_on_training_prompts(task: Path):
    answers = {row["prompt"]: row["answer"] for row in rows(task, "train")}
    shown = rows(task, "demonstrations")
    calls = [row for row in shown if isinstance(row["response"], list)]
    assert len(calls) / len(shown) == pytest.approx(0.4, abs=0.01)
    for row in shown[:500]:
        *turns, last = row["response"] if isinstance(row["response"], list) else [row["response"]]
        assert last == f"Answer:{answers[row['prompt']]}"
        if turns:
            call, read = turns
            arguments = json.loads(call.removeprefix("<tool_call>").removesuffix("</tool_call>"))
            expression = row["prompt"].rstrip("=")
            assert arguments == {"name": "calculator", "arguments": {"expression": expression}}
            assert read == f"<tool_response>{calculate(expression)}</tool_response>"


def test_a_call_is_seven_tokens_and_what_the_calculator_writes_is_not_trained_on(config: Config, tokenizer):
    check_tokenizer_fits(tokenizer, load_hf_config(config.model))
    assert stop_token_ids(config.model, tokenizer) == (1,)
    shown, lost = load_demonstrations(config, tokenizer, most=128)
    assert not lost
    called = next(row for row in shown if not row.trained.all())
    call, read, answer = np.split(called.response, np.flatnonzero(np.diff(called.trained)) + 1)
    texts = [tokenizer.decode(part) for part in (call, read, answer)]
    assert texts[0].startswith('<tool_call>{"name": "calculator"') and texts[0].endswith('"}}</tool_call>')
    assert texts[1].startswith("<tool_response>") and texts[1].endswith("</tool_response>")
    assert texts[2].startswith("Answer:") and texts[2].endswith("<eos>")
    assert len(call) == 7  # begin, 12*34, end
    assert load_prompts(config.data, tokenizer).prompts[0].text == "10*11="


def test_a_few_steps_call_the_calculator_and_read_what_it_says(task: Path, config: Config, tmp_path: Path):
    settings = config.model_dump(mode="json")
    settings["output_dir"], settings["num_rollout_steps"] = str(tmp_path), 2
    settings["warm_start"] |= {"batch_size": 32, "max_updates": 60, "check_every": 60}
    settings["warm_start"]["choose"]["limit"] = settings["eval"]["sets"]["heldout"]["limit"] = 16
    settings["sampling"]["style"], settings["rollout"]["num_threads"] = "none", 1
    settings["observe"] |= {"samples_per_step": 1000, "tensorboard": False, "plot_at_end": False}
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(settings))
    subprocess.run([sys.executable, *TRAIN, tmp_path / "few.yaml"], check=True, capture_output=True)
    folder = tmp_path / "tools_quickstart"
    samples = [json.loads(line) for path in folder.glob("samples/*.jsonl") for line in path.read_text().splitlines()]
    called = [(sample, call) for sample in samples for call in sample.get("calls", []) if is_product(call)]
    assert len(called) > 5
    for sample, call in called:
        assert call["output"] == calculate(json.loads(call["arguments"])["expression"])
        assert f"<tool_response>{call['output']}</tool_response>" in sample["response"]
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["turns/mean"] > 1


def is_product(call: dict) -> bool:
    """Return True for a call as the demonstrations show it. The young policy also writes others, with outputs of any length."""
    return re.fullmatch(r'\{"expression": "\d{2}\*\d{2}"\}', call["arguments"]) is not None
