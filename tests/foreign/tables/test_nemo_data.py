"""NeMo-RL's prompts in our words, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dapo_mcore.config.data import DataConfig
from dapo_mcore.foreign.tables.nemo_data import DATA_SETS
from tests.foreign.nemo_runs import imported, ours

FILE = {"data.train.data_path": "/d.jsonl"}


def test_limits_of_prompts_and_responses() -> None:
    limits = {"data.max_input_seq_length": 200, "policy.max_total_sequence_length": 1000}
    found = ours(limits)
    assert (found["data.max_prompt_tokens"], found["rollout.max_response_tokens"]) == (200, 800)
    evaluated = ours({**limits, "data.validation.data_path": "/e.jsonl"})
    assert (evaluated["eval.sets.validation.max_prompt_tokens"], evaluated["eval.sets.validation.on_long_prompt"]) == (
        200,
        "drop",
    )
    assert ours({**limits, "policy.generation.max_new_tokens": 500})["rollout.max_response_tokens"] == 500
    assert {"data.max_prompt_tokens", "rollout.max_response_tokens"} <= set(imported({}).asked)
    shared = {"policy.max_total_sequence_length": 16384, "policy.generation.max_new_tokens": 4096}
    assert ours(shared)["rollout.max_response_tokens"] == 4096
    assert "12288 leave each prompt its response" in imported(shared).asked["data.max_prompt_tokens"].note


def test_data_by_name_is_asked_for() -> None:
    assert "data.files" in imported({"data.train.dataset_name": "X"}).asked
    found = ours(
        {"data.train.data_path": "/d.jsonl", "data.train.input_key": "q", "data.validation.data_path": "/e.jsonl"}
    )
    assert (found["data.files"], found["data.prompt_key"], found["eval.sets.validation.files"]) == (
        ["/d.jsonl"],
        "q",
        ["/e.jsonl"],
    )
    assert (found["data.answer_key"], found["eval.sets.validation.prompt_key"]) == ("output", "input"), "its defaults"


def test_a_list_of_data_sets_or_a_loader_of_ones_own_is_asked_for() -> None:
    for key, value in {"data.train": [{"data_path": "/a"}], "data.custom_dataloader": "mine.loader"}.items():
        conversion = imported({key: value, **FILE})
        assert conversion.kind_of(key) == "asked" and "data.files" in conversion.asked
    assert "eval.sets.validation.files" in imported({"data.validation": [{"data_path": "/a"}]}).asked


def test_names_and_paths_of_the_hub() -> None:
    found = ours(
        {"data.train.dataset_name": "gsm8k", "data.train.split": "test", "data.validation.dataset_name": "AIME2025"}
    )
    assert (found["data.files"], found["data.answer_pattern"]) == (["hf://openai/gsm8k/main:test"], "#### (.+)")
    assert len(found["eval.sets.validation.files"]) == 2
    path = {"data.train.data_path": "org/name", "data.train.subset": "a", "data.train.split": "b"}
    assert ours(path)["data.files"] == ["hf://org/name/a:b"]
    for known in DATA_SETS.values():
        DataConfig(files=[file.format(split="train") for file in known.files], answer_pattern=known.answer_pattern)


def test_the_text_around_prompts_is_read_beside_the_configuration(tmp_path: Path) -> None:
    """NeMo-RL puts the prompt into the text by str.format: two braces are one."""
    (tmp_path / "prompts").mkdir()
    (tmp_path / "configs" / "mine").mkdir(parents=True)
    (tmp_path / "prompts" / "box.txt").write_text("Put it in \\boxed{{}}:\n{}\nGo.")
    (tmp_path / "prompts" / "system.txt").write_text("You are terse.")
    file = tmp_path / "configs" / "mine" / "run.yaml"
    texts = {"data.default.prompt_file": "prompts/box.txt", "data.default.system_prompt_file": "prompts/system.txt"}
    both: dict[str, Any] = {
        **FILE,
        **texts,
        "data.validation.data_path": "/e.jsonl",
        "data.validation.prompt_file": None,
    }
    conversion = imported(both, file=file)
    found = {key: value for key, (value, _) in conversion.values().items()}
    assert found["data.prompt_template"] == "Put it in \\boxed{}:\n{prompt}\nGo."
    assert found["data.system_prompt"] == found["eval.sets.validation.system_prompt"] == "You are terse."
    assert "eval.sets.validation.prompt_template" not in found, "the set's own null wins"
    assert conversion.losses == {"data.train.split_validation_size": False}
    DataConfig(files=["x"], chat_template=True, prompt_template=found["data.prompt_template"])


def test_a_text_that_cannot_be_read_is_asked_for(tmp_path: Path) -> None:
    assert "data.prompt_template" in imported({}).asked, "NeMo-RL's default has one"
    assert "data.prompt_template" not in imported({}, config="").asked, "a configuration of its own may have none"
    for text in ("no place", "{} {}", "{name}", "{prompt} {}", "{"):
        (tmp_path / "text.txt").write_text(text)
        conversion = imported({**FILE, "data.default.prompt_file": "text.txt"}, file=tmp_path / "run.yaml")
        assert "data.prompt_template" in conversion.asked and not conversion.unaccepted([])
    (tmp_path / "id_rsa").write_text("{}")
    assert "data.prompt_template" in imported({"data.default.prompt_file": "id_rsa"}, file=tmp_path / "run.yaml").asked


def test_a_text_around_chats_is_lost() -> None:
    assert imported({"data.train.dataset_name": "DAPOMath17K"}).losses["data.default.prompt_file"] is True


def test_templates_of_the_tokenizer() -> None:
    key = "policy.tokenizer.chat_template"
    assert ours({key: "default"})["data.chat_template"] is True
    assert ours({key: None})["data.chat_template"] is False, "null is NeMo-RL's template that adds nothing"
    assert ours({key: "my.jinja"})["data.chat_template"] == "my.jinja"
    assert imported({key: "{% for m in messages %}x{% endfor %}"}).losses[key] is True
    found = ours(
        {"policy.tokenizer.chat_template_kwargs.enable_thinking": False, "data.validation.data_path": "/e.jsonl"}
    )
    assert (
        found["data.chat_template_kwargs"]
        == found["eval.sets.validation.chat_template_kwargs"]
        == {"enable_thinking": False}
    )


def test_when_and_on_what_it_evaluates() -> None:
    own = {**FILE, "data.validation.data_path": "/e.jsonl", "grpo.max_val_samples": 960}
    assert ours(own)["eval.sets.validation.limit"] == 768, "three whole batches of 256"
    assert ours({**own, "grpo.val_batch_size": 960})["eval.sets.validation.limit"] == 960
    assert ours({**own, "grpo.val_period": 0, "grpo.val_at_start": True})["eval.every"] is None
    assert "eval.every" not in ours({**own, "grpo.val_period": 0})
    assert ours({**own, "data.validation.repeat": 16})["eval.samples_per_prompt"] == 16
    held_out = {"data.train.split_validation_size": 0.1}
    assert "eval.sets.validation.files" in imported({**FILE, **held_out}).asked
    assert ours({**FILE, **held_out, "data.train.input_key": "q"})["eval.sets.validation.prompt_key"] == "q"
    assert imported({**own, **held_out}).losses == {"data.train.split_validation_size": False}
    assert "eval.every" not in ours({"data.train.dataset_name": "DeepScaler"}), "which leaves nothing out"


def test_rows_of_other_kinds_are_lost() -> None:
    assert (
        imported({**FILE, "data.default.processor": "vlm_hf_data_processor"}).losses["data.default.processor"] is True
    )
