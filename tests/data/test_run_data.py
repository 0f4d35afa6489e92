"""All data of a run is checked against the model's positions and the token budget. Messages name the right keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import BloomConfig, Qwen2Config

from dapo_mcore.config.schema import Config
from dapo_mcore.data.run_data import load_run_data
from dapo_mcore.errors import ConfigError, DataError
from dapo_mcore.model_files.hf_config import max_positions


@pytest.fixture
def load(tokenizer, tmp_path: Path):
    """Load a run's data: prompts of 1, 2, … 5 characters in each file, and demonstrations of twice as many."""
    rows = [{"prompt": "abcde"[:n], "answer": n, "response": "abcde"[:n]} for n in range(1, 6)]
    for name in ("train", "test", "demos", "choose"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def section(name: str, **settings) -> dict:
        return {"files": str(tmp_path / f"{name}.jsonl"), "answer_key": "answer", "max_prompt_tokens": 5, **settings}

    def load(positions: int = 13, max_tokens: int = 13, context: int = 1, resumes: bool = False, **settings):
        """`settings`: more of the sections data, test and choose."""
        config = Config.model_validate(
            {
                "model": {"path": "unused"},
                "data": section("train", **settings.get("data", {})),
                "eval": {"sets": {"held.out": section("test", **settings.get("test", {}))}},
                "warm_start": {
                    "files": str(tmp_path / "demos.jsonl"),
                    "batch_size": settings.get("batch_size", 5),
                    "choose": section("choose", **settings.get("choose", {})),
                },
                "rollout": {"max_response_tokens": 2 if max_tokens < 13 else 8},
                "batch": {"max_tokens": max_tokens},
                "parallel": {"context_parallel": context},
            }
        )
        hf_config = Qwen2Config(max_position_embeddings=positions)
        return load_run_data(config, hf_config, tokenizer, warm_start=not resumes)

    return load


def test_data_that_just_fits_is_loaded(load):
    data = load()
    assert [found.section for found in data.prompt_sets] == ["data", "eval.sets.held.out", "warm_start.choose"]
    assert [len(row) for row in data.demonstrations] == [3, 5, 7, 9, 11]
    assert data.lines() == [f"{found.section}: 5 rows gave 5 prompts" for found in data.prompt_sets]


def test_demonstrations_are_rendered_as_chats_where_the_training_prompts_are(
    load, tokenizer, tmp_path: Path, monkeypatch
):
    """`a` is token 70 and `-` 18; the response is of the policy alone."""
    monkeypatch.setattr(tokenizer, "chat_template", "{{ mark }}{{ messages[0].content }}")
    chat = {"prompt": [{"role": "user", "content": "abc"}], "answer": 1}
    (tmp_path / "train.jsonl").write_text(json.dumps(chat) + "\n")
    data = load(data={"chat_template_kwargs": {"mark": "-"}})
    assert data.train.prompts[0].text == "-abc"
    mark = tokenizer.encode("-", add_special_tokens=False)
    assert data.demonstrations[0].prompt.tolist() == [*mark, 70]
    assert data.evaluation["held.out"].prompts[0].text == "a"


def test_other_variables_of_a_template_than_in_training_are_told(load, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ mark }}{{ messages[0].content }}")
    chats = {"chat_template": True, "chat_template_kwargs": {"mark": "-"}}
    told = [line for line in load(data=chats, test={"chat_template": True}).lines() if "in two ways" in line]
    assert told == [
        "warning: eval.sets.held.out.chat_template_kwargs is {}, but data.chat_template_kwargs is {'mark': '-'}; the same question is "
        "asked in two ways"
    ]
    assert not [line for line in load(data=chats, test=chats, choose=chats).lines() if "in two ways" in line]


def test_a_resumed_run_does_not_need_its_demonstrations(load, tmp_path: Path):
    (tmp_path / "demos.jsonl").unlink()
    (tmp_path / "choose.jsonl").unlink()
    data = load(resumes=True)
    assert (data.demonstrations, data.choose) == ((), None)


@pytest.mark.parametrize(
    ("section", "shorter"),
    [("data", ()), ("eval.sets.held.out", ("data",)), ("warm_start.choose", ("data", "test"))],
)
def test_a_prompt_without_room_for_a_response_is_named_with_the_key_of_its_set(load, section, shorter):
    drop = {"max_prompt_tokens": 3, "on_long_prompt": "drop"}
    with pytest.raises(DataError) as error:
        load(positions=11, **dict.fromkeys(shorter, drop))
    name = {"data": "train", "eval.sets.held.out": "test", "warm_start.choose": "choose"}[section]
    assert str(error.value).partition(f"{name}.jsonl ")[2] == (
        "row 4: the prompt has 4 tokens; with rollout.max_response_tokens 8 that is 12, but the model has "
        f"max_position_embeddings 11 (2 of 5 prompts of {section} are too long, the longest has 5 tokens); lower "
        f"rollout.max_response_tokens to 6, or set {section}.max_prompt_tokens 3 with {section}.on_long_prompt drop, "
        "or use a model with more positions"
    )


def test_an_evaluation_set_may_have_longer_responses_than_training(load):
    with pytest.raises(
        DataError, match=r"with eval.sets.held.out.max_response_tokens 11 that is 14.* to 8, or set eval"
    ):
        load(test={"max_response_tokens": 11})
    assert len(load(test={"max_response_tokens": 8}).evaluation["held.out"].prompts) == 5


def test_responses_that_leave_no_room_for_any_prompt_are_refused(load):
    with pytest.raises(
        DataError, match=r"row 1: .* max_position_embeddings 8 .*5 of 5 .*; lower rollout.* to 3, or use"
    ):
        load(positions=8)
    with pytest.raises(DataError, match=r"longest has 5 tokens\); use a model with more positions$"):
        load(positions=4)


def test_rope_scaling_does_not_add_positions():
    """Engines, and SGLang's servers too, limit prompts to max_position_embeddings itself."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    assert max_positions(Qwen2Config(max_position_embeddings=64, rope_parameters=yarn)) == 64
    with pytest.raises(ConfigError, match="must say max_position_embeddings"):
        max_positions(BloomConfig())


def test_demonstrations_must_fit_the_positions_and_the_token_budget(load):
    small = {name: {"max_prompt_tokens": 2, "on_long_prompt": "drop"} for name in ("data", "test", "choose")}
    with pytest.raises(DataError, match=r"demos.jsonl row 5: .* 11 tokens .* max_position_embeddings 10; shorten"):
        load(positions=10, **small)
    with pytest.raises(
        DataError, match=r"row 5: .* 11 tokens .* 5 × context_parallel 2 = 10; raise batch.max_tokens to 6"
    ):
        load(max_tokens=5, context=2)
    assert load(max_tokens=6, context=2).demonstrations
    with pytest.raises(DataError, match=r"hold 5 demonstrations, fewer than warm_start.batch_size 6"):
        load(batch_size=6)


def test_characters_that_demonstrations_lose_give_a_warning(load, tmp_path: Path):
    with (tmp_path / "demos.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"prompt": "dé", "response": "1é字"}\n')
    told = load().lines()[-1]
    assert told.startswith(
        "warning: 1 of 6 demonstrations of warm_start.files lose characters that the tokenizer has no token for: é 字 (first in "
        f"{tmp_path}/demos.jsonl row 6); "
    )


def test_prompts_that_do_not_fit_give_a_warning_with_their_number(load):
    lines = load(
        data={"max_prompt_tokens": 4}, test={"max_prompt_tokens": 1, "on_long_prompt": "drop", "limit": 9}
    ).lines()
    assert lines[1:2] + lines[3:5] == [
        "warning: 1 of 5 prompts of data are longer than data.max_prompt_tokens 4 (the longest has 5) and lose their "
        "beginning; raise it, or set data.on_long_prompt drop",
        "warning: 4 of 5 prompts of eval.sets.held.out are longer than eval.sets.held.out.max_prompt_tokens 1 "
        "(the longest has 5) and left out; raise it",
        "warning: eval.sets.held.out.limit is 9, but there are only 1 prompts",
    ]


def test_a_set_whose_prompts_would_all_be_cut_is_refused(load, tmp_path: Path):
    (tmp_path / "test.jsonl").write_text('{"prompt": "abc", "answer": 1}\n{"prompt": "abcd", "answer": 1}\n')
    with pytest.raises(
        DataError, match=r"all 2 prompts of .* than eval.sets.held.out.max_prompt_tokens 2.* 2 to at most 4"
    ):
        load(test={"max_prompt_tokens": 2})
    with pytest.raises(
        DataError, match=r"no usable prompt .*; raise eval.sets.held.out.max_prompt_tokens from 2 to at most"
    ):
        load(test={"max_prompt_tokens": 2, "on_long_prompt": "drop"})
