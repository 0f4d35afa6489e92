"""Prompts, evaluation sets and demonstrations: rules inside one section."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from dapo_mcore.config.data import DataConfig, EvalConfig, EvalSampling


def test_a_prompt_is_plain_text_or_a_chat() -> None:
    assert DataConfig(files="a", system_prompt="S", chat_template=True).files == ["a"]
    with pytest.raises(ValidationError, match="system_prompt needs a chat template"):
        DataConfig(files="a", system_prompt="S", chat_template=False)
    with pytest.raises(ValidationError, match="a chat template writes its own BOS: set add_bos false"):
        DataConfig(files="a", chat_template=True, add_bos=True)


def test_null_may_turn_out_to_be_a_chat_or_plain_text() -> None:
    assert DataConfig(files="a", system_prompt="S", add_bos=True).chat_template is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chat_template": False, "chat_template_kwargs": {"x": 1}}, "chat_template_kwargs need a chat template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "has tokenize, which the run sets itself"),
    ],
)
def test_variables_are_for_a_chat_template(settings, message) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig(files="a", **settings)


def test_a_set_takes_what_it_does_not_name_from_eval() -> None:
    sets = {"aime": {"files": "a", "samples_per_prompt": 32, "temperature": 0.0, "top_k": 20}, "math": {"files": "b"}}
    config = EvalConfig(sets=sets, samples_per_prompt=2, top_p=0.7, max_response_tokens=9)
    assert config.of("aime") == EvalSampling(32, 0.0, 0.7, 20, 9)
    assert config.of("math") == config.of("not in the file") == EvalSampling(2, 1.0, 0.7, -1, 9)


def test_rows_of_an_evaluation_set_are_repeated_on_purpose() -> None:
    assert DataConfig(files="a").deduplicate
    assert not EvalConfig(sets={"aime": {"files": "a"}}).sets["aime"].deduplicate


def test_kwargs_of_a_set_are_for_a_function_of_its_own() -> None:
    with pytest.raises(
        ValidationError,
        match=r"reward_kwargs \(bonus\) are for a function of the set's own; name it in reward_function",
    ):
        EvalConfig(sets={"aime": {"files": "a", "reward_kwargs": {"bonus": 1}}})
