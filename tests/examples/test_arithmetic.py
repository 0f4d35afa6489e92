"""The quickstart's files: right, disjoint, deterministic, and readable by the code that trains on them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from dapo_mcore.config.data import DataConfig
from dapo_mcore.config.model import ModelConfig
from dapo_mcore.data.prompts import load_prompts
from dapo_mcore.model_files.hf_config import check_tokenizer_fits, load_hf_config, load_tokenizer, stop_token_ids
from dapo_mcore.reward.math_answer import compute_score

SCRIPT = Path(__file__).parents[2] / "examples" / "arithmetic.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("arithmetic_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("task")
    told = subprocess.run([sys.executable, SCRIPT, "--out", out], capture_output=True, text=True, check=True)
    assert told.stdout.startswith(f"wrote {out}: model/, train.jsonl (")
    assert len(told.stdout.splitlines()) == 1
    return out


@pytest.fixture(scope="module")
def model(task: Path) -> ModelConfig:
    return ModelConfig(path=str(task / "model"), init="random")


@pytest.fixture(scope="module")
def tokenizer(model: ModelConfig):
    return load_tokenizer(model)


def rows(task: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (task / f"{name}.jsonl").read_text().splitlines()]


def test_steps_with_and_without_a_carry(example: ModuleType):
    assert example.addition_steps(66, 20) == ["6+0+0=6;", "6+2+0=8;"]
    assert example.addition_steps(67, 58) == ["7+8+0=15;", "6+5+1=12;"]


def test_the_splits_are_disjoint_and_together_part_of_every_problem(task: Path):
    prompts = {name: [row["prompt"] for row in rows(task, name)] for name in ("train", "choose", "heldout")}
    together = [prompt for split in prompts.values() for prompt in split]
    assert len(together) == len(set(together))
    assert (len(prompts["choose"]), len(prompts["heldout"])) == (128, 128)
    every = {f"{a}+{b}=" for a in range(10, 100) for b in range(10, 100)}
    digit = {prompt: int(hashlib.md5(prompt.encode()).hexdigest(), 16) % 10 for prompt in every}
    assert set(prompts["train"]) == {prompt for prompt in every if digit[prompt] > 1}
    assert all(digit[prompt] == 0 for prompt in prompts["heldout"])
    assert all(digit[prompt] == 1 for prompt in prompts["choose"])


def test_answers_are_sums(task: Path):
    for name in ("train", "choose", "heldout"):
        for row in rows(task, name):
            a, b = row["prompt"].rstrip("=").split("+")
            assert row["answer"] == str(int(a) + int(b))


def test_demonstrations_are_right_in_three_styles_and_only_from_train(task: Path):
    answers = {row["prompt"]: row["answer"] for row in rows(task, "train")}
    shown = rows(task, "demonstrations")
    assert len(shown) == 40_000
    assert all(row["response"].endswith(f"Answer:{answers[row['prompt']]}") for row in shown)
    assert all(compute_score(row["response"], answers[row["prompt"]])["acc"] for row in shown[:500])
    num_steps = [row["response"].count(";") for row in shown]
    assert set(num_steps) == {0, 2, 4, 5, 6}
    assert num_steps.count(0) / 40_000 == pytest.approx(0.5, abs=0.01)
    assert num_steps.count(2) / 40_000 == pytest.approx(0.3, abs=0.01)


def test_mixed_prompts_are_of_three_kinds_with_right_answers(task: Path):
    mixed = rows(task, "mixed")
    prompts = [row["prompt"] for row in mixed]
    kinds = {
        "plain": [prompt for prompt in prompts if re.fullmatch(r"\d\d\+\d\d=", prompt)],
        "solved": [prompt for prompt in prompts if prompt.endswith(";")],
        "large": [prompt for prompt in prompts if re.fullmatch(r"\d{5}\+\d{5}=", prompt)],
    }
    assert {name: len(found) for name, found in kinds.items()} == {"plain": 1000, "solved": 1000, "large": 2000}
    assert len(set(prompts)) == 4000
    for row in mixed:
        a, b = row["prompt"].partition("=")[0].split("+")
        assert row["answer"] == str(int(a) + int(b))
    held_out = {row["prompt"] for name in ("choose", "heldout") for row in rows(task, name)}
    assert not held_out & {f"{prompt.partition('=')[0]}=" for prompt in prompts}


def test_the_same_seed_gives_the_same_files(example: ModuleType, task: Path, tmp_path: Path):
    example.write_task(tmp_path / "same", 0)
    example.write_task(tmp_path / "other", 1)
    files = [path.relative_to(task) for path in task.rglob("*.json*")]
    assert len(files) == 9
    changed = {str(f) for f in files if (task / f).read_bytes() != (tmp_path / "other" / f).read_bytes()}
    assert all((task / f).read_bytes() == (tmp_path / "same" / f).read_bytes() for f in files)
    assert changed == {"choose.jsonl", "heldout.jsonl", "demonstrations.jsonl", "mixed.jsonl"}


def test_the_tokenizer_has_one_token_per_character_and_one_for_answer(model: ModelConfig, tokenizer):
    text = "66+20=6+0+0=6; 6+2+0=8;-Answer:86"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text) - len("Answer:") + 1
    assert ids.count(3) == 1
    assert tokenizer.decode([2, *ids, 1, 0], skip_special_tokens=True) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert stop_token_ids(model, tokenizer) == (1,)


def test_other_readers_of_the_folder_agree(task: Path, tokenizer):
    """A rollout server reads the same folder with AutoTokenizer or PreTrainedTokenizerFast."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    text = "6+2+0=8;Answer:86 "
    for reader in (AutoTokenizer, PreTrainedTokenizerFast):
        other = reader.from_pretrained(task / "model")
        assert other.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False)
        assert other.decode(other.encode(text, add_special_tokens=False)) == text


def test_the_model_is_the_documented_size(model: ModelConfig, tokenizer):
    from transformers import AutoModelForCausalLM

    config = load_hf_config(model)
    check_tokenizer_fits(tokenizer, config)
    assert (config.initializer_range, config.rope_parameters["rope_theta"]) == (0.05, 10000.0)
    assert AutoModelForCausalLM.from_config(config).num_parameters() == 125_504


def test_the_training_code_reads_the_prompts(task: Path, tokenizer):
    config = DataConfig(files=[str(task / "train.jsonl")], answer_key="answer", add_bos=True, max_prompt_tokens=7)
    found = load_prompts(config, tokenizer)
    assert found.num_truncated == found.num_duplicates == 0
    assert found.prompts[0].text == "10+10="
    assert found.prompts[0].token_ids.tolist() == [2, 5, 4, 14, 5, 4, 16]
