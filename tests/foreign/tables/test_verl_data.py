"""verl's prompts and evaluation sets in our words."""

from __future__ import annotations

from pathlib import Path

from dapo_mcore.foreign.convert import convert
from dapo_mcore.foreign.settings import ForeignRun, ForeignSetting
from dapo_mcore.foreign.table import Source
from dapo_mcore.foreign.tables.verl import VERL
from tests.foreign.verl_runs import GRPO, M, R, asked, imported, lost, ours

VAL = f"{R}.val_kwargs"


def test_files_are_lists_and_rows_are_kept() -> None:
    found = ours({"data.train_files": ["a.parquet", "b.parquet"]})
    assert (found["data.files"], found["data.deduplicate"]) == (["a.parquet", "b.parquet"], False)
    assert ours({"data.train_files": "a.parquet"})["data.files"] == ["a.parquet"]
    assert "data.files" in asked({"data.train_files": ""})


def test_filtering_of_long_prompts_wins_over_truncation() -> None:
    assert ours({"data.truncation": "left"})["data.on_long_prompt"] == "truncate_left"
    assert ours({"data.truncation": "middle"})["data.on_long_prompt"] == "truncate_middle"
    assert ours({"data.truncation": "left", "data.filter_overlong_prompts": True})["data.on_long_prompt"] == "drop"
    assert ours({})["data.on_long_prompt"] == "error"


def test_what_the_template_is_told() -> None:
    whole = {"data.apply_chat_template_kwargs": {"enable_thinking": False}}
    part = {"data.apply_chat_template_kwargs.enable_thinking": False}
    assert (
        ours(whole)["data.chat_template_kwargs"]
        == ours(part)["data.chat_template_kwargs"]
        == {"enable_thinking": False}
    )


def test_a_named_set_per_file() -> None:
    settings = {"data.val_files": ["/d/aime-2024.parquet", "/d/gsm8k/test.parquet", "/e/gsm8k/test.parquet"]}
    found = ours({**settings, "trainer.test_freq": 5, "data.max_prompt_length": 1024})
    assert found["eval.sets.aime-2024.files"] == ["/d/aime-2024.parquet"]
    assert found["eval.sets.gsm8k.files"] == ["/d/gsm8k/test.parquet"]
    assert found["eval.sets.gsm8k_3.files"] == ["/e/gsm8k/test.parquet"]
    assert list(ours({"data.val_files": "./data/val.parquet"})).count("eval.sets.val.files") == 1, "data says nothing"
    assert found["eval.sets.gsm8k.deduplicate"] is False and found["eval.sets.gsm8k.max_prompt_tokens"] == 1024


def test_when_it_is_evaluated() -> None:
    found = ours({"trainer.test_freq": -1, "trainer.val_before_train": True})
    assert (found["eval.every"], found["eval.at_start"]) == (None, True)
    never = ours({"trainer.test_freq": -1, "trainer.val_before_train": False})
    assert not any(key.startswith("eval.") for key in never)


def test_evaluation_is_greedy_by_default_in_verl() -> None:
    found = ours({"trainer.test_freq": 5})
    assert [found[f"eval.{key}"] for key in ("samples_per_prompt", "temperature", "top_p", "top_k")] == [1, 0, 1.0, -1]


def test_do_sample_is_asked_for_where_versions_differ() -> None:
    assert "eval.temperature" in asked({"trainer.test_freq": 5, f"{VAL}.temperature": 0.6})
    assert "eval.temperature" in asked({"trainer.test_freq": 5, f"{VAL}.temperature": 0.6, f"{VAL}.do_sample": False})
    sampled = {"trainer.test_freq": 5, f"{VAL}.temperature": 0.6, f"{VAL}.do_sample": True, f"{VAL}.n": 32}
    assert "eval.temperature" not in asked(sampled)
    assert (ours(sampled)["eval.temperature"], ours(sampled)["eval.samples_per_prompt"]) == (0.6, 32)
    old = ours({"trainer.test_freq": 5, f"{R}.val_temperature": 0.6, f"{R}.n_val": 8})
    assert (old["eval.temperature"], old["eval.samples_per_prompt"]) == (0.6, 8)


def test_a_model_of_images_is_lost_by_one_name() -> None:
    assert lost({f"{M}.path": "Qwen/Qwen2.5-VL-7B-Instruct"}) == {f"{M}.path": True}
    assert lost({f"{M}.path": "Qwen/Qwen2.5-VL-7B-Instruct", "data.image_key": "images"}) == {"data.image_key": True}
    assert lost({f"{M}.path": "Qwen/Qwen3-8B"}) == {}


def test_the_engines_own_length_cuts_responses() -> None:
    assert ours({"data.max_response_length": 2048})["rollout.max_response_tokens"] == 2048
    both = ours({"data.max_response_length": 2048, f"{R}.response_length": 1024})
    assert both["rollout.max_response_tokens"] == 1024


def test_evaluation_has_the_templates_variables_too() -> None:
    found = ours({"data.apply_chat_template_kwargs.enable_thinking": False, "data.val_files": "aime.parquet"})
    assert found["eval.sets.aime.chat_template_kwargs"] == {"enable_thinking": False}


def test_a_limit_of_rows_says_which_rows() -> None:
    settings = {"data.train_max_samples": 100, "data.val_max_samples": 30, "data.val_files": "aime.parquet"}
    for shuffle in (True, False):
        conversion = imported({**GRPO, **settings, "data.shuffle": shuffle})
        limits = [outcome for outcome in conversion.outcomes if str(outcome.ours).endswith("limit")]
        assert [outcome.value for outcome in limits] == [100, 30]
        assert all(("at random" in outcome.note) == shuffle for outcome in limits)
    assert ours({"data.train_max_samples": -1})["data.limit"] is None


def test_files_of_evaluation_from_outside_are_one_question() -> None:
    unknown = ForeignSetting("data.val_files", ["~/data/${1}/test.parquet"], "run.sh line 1", ("argument 1",))
    conversion = convert(ForeignRun("verl", Path("run.sh"), "verl.trainer.main_ppo", "", (unknown,)), VERL)
    assert [key for key in conversion.asked if key.startswith("eval.")] == ["eval.sets"]
    assert conversion.values()["eval.samples_per_prompt"][0] == 1


def test_default_columns_of_a_resolved_configuration_say_nothing() -> None:
    settings = (
        ForeignSetting("data.image_key", "images", "config.yaml"),
        ForeignSetting("data.video_key", "clips", "config.yaml"),
        ForeignSetting(f"{M}.path", "Qwen/Qwen3-8B", "config.yaml"),
    )
    run = ForeignRun("verl", Path("config.yaml"), "", "", settings, complete=True)
    outcomes = [
        outcome for rule in VERL.rules if "data.image_key" in rule.keys for outcome in rule.apply(Source(run, {}))
    ]
    assert [(outcome.kind, outcome.sources[0]) for outcome in outcomes] == [
        ("meaningless", "data.image_key"),
        ("lost", "data.video_key"),
    ]


def test_losses_of_rows_and_templates() -> None:
    for key, value in (
        ("data.datagen.path", "d.py"),
        (f"{M}.custom_chat_template", "{{ m }}"),
        (f"{M}.tokenizer_path", "/t"),
    ):
        assert lost({key: value}) == {key: True}
