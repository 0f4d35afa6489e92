"""config.json and tokenizer files of a model folder, and every way in which they can be unusable."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from dapo_mcore.config.model import ModelConfig
from dapo_mcore.errors import ConfigError
from dapo_mcore.model_files.hf_config import (
    check_tokenizer_fits,
    load_hf_config,
    load_tokenizer,
    pad_token,
    stop_token_ids,
)


def model(folder: Path, **settings) -> ModelConfig:
    return ModelConfig(path=str(folder), **settings)


@pytest.fixture
def copy(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "copy"))


def test_config_json_is_read_as_it_is_stored(model_folder: Path):
    config = load_hf_config(model(model_folder))
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("qwen2", 4, 16)


def test_overrides_apply_before_derived_fields(copy: Path):
    stored = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**stored, "layer_types": ["full_attention"] * 4}))
    config = load_hf_config(model(copy, init="random", overrides={"num_hidden_layers": 2, "rope_theta": 7.0}))
    assert config.num_hidden_layers == 2
    assert len(config.layer_types) == 2
    assert config.rope_parameters["rope_theta"] == 7.0
    assert config.hidden_size == 16


def test_an_override_may_set_a_key_that_only_the_config_class_has(model_folder: Path):
    assert load_hf_config(model(model_folder, overrides={"attention_dropout": 0.5})).attention_dropout == 0.5


def test_positions_and_rope_of_stored_weights_may_change(copy: Path):
    """Each spelling of the rotary embedding counts, whichever the file has."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    stored = json.loads((copy / "config.json").read_text())
    old = {key: value for key, value in stored.items() if key != "rope_parameters"} | {"rope_theta": 7.0}
    new = {key: value for key, value in stored.items() if key not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}
    for tree in (old, new):
        (copy / "config.json").write_text(json.dumps(tree))
        config = load_hf_config(model(copy, overrides={"max_position_embeddings": 131072, "rope_scaling": yarn}))
        assert config.max_position_embeddings == 131072
        assert {**config.rope_parameters, "type": None} == {**yarn, "rope_theta": 7.0, "type": None}
        theta = load_hf_config(model(copy, overrides={"rope_theta": 9.0})).rope_parameters
        assert theta == {**load_hf_config(model(copy)).rope_parameters, "rope_theta": 9.0}
        none = load_hf_config(model(copy, overrides={"rope_scaling": None})).rope_parameters
        assert none == {"rope_type": "default", "rope_theta": 7.0}
        whole = load_hf_config(model(copy, overrides={"rope_parameters": {**yarn, "rope_theta": 8.0}})).rope_parameters
        assert (whole["rope_theta"], whole["rope_type"]) == (8.0, "yarn")


def test_overrides_that_change_stored_weights_are_refused_with_the_numbers(model_folder: Path):
    overrides = {"num_hidden_layers": 2, "max_position_embeddings": 64, "tie_word_embeddings": True}
    with pytest.raises(ConfigError) as error:
        load_hf_config(model(model_folder, overrides=overrides))
    told = str(error.value)
    assert "num_layers from 4 to 2, tied from False to True, moe_layers" in told
    assert told.endswith("leave these keys out, or set model.init random") and "64" not in told
    assert load_hf_config(model(model_folder, init="random", overrides=overrides)).num_hidden_layers == 2


def test_an_unknown_override_names_the_nearest_key(model_folder: Path):
    with pytest.raises(ConfigError, match=r"'num_layer'.*did you mean 'num_hidden_layers'"):
        load_hf_config(model(model_folder, overrides={"num_layer": 2}))


def test_an_override_of_a_wrong_type_is_refused(model_folder: Path):
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        load_hf_config(model(model_folder, overrides={"num_hidden_layers": "two"}))


def test_a_missing_folder_or_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="is not a folder"):
        load_hf_config(model(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="is not a folder"):
        load_tokenizer(model(tmp_path / "absent"))
    with pytest.raises(ConfigError, match=r"no config\.json.*no files"):
        load_hf_config(model(tmp_path))
    with pytest.raises(ConfigError, match="no tokenizer can be loaded"):
        load_tokenizer(model(tmp_path))


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "no_such_model"}', "{}"])
def test_a_broken_config_is_refused(copy: Path, content: str):
    (copy / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_hf_config(model(copy))


def test_a_broken_tokenizer_is_refused(copy: Path):
    (copy / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ConfigError, match="no tokenizer can be loaded"):
        load_tokenizer(model(copy))


def test_the_two_tokenizer_files_are_enough(copy: Path):
    (copy / "config.json").unlink()
    assert load_tokenizer(model(copy)).encode("ab", add_special_tokens=False) == [70, 71]


def test_tokenizer_json_wins_over_the_class_of_the_architecture(model_folder: Path):
    """transformers makes a Qwen2Tokenizer for any folder of model_type qwen2, whose BPE would drop some of this text."""
    tokenizer = load_tokenizer(model(model_folder))
    text = "Answer: 12 + 3\n= 15"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text)
    assert tokenizer.decode([*ids, 1], skip_special_tokens=True) == text


def test_the_real_qwen_tokenizer_keeps_its_own_class(real_data, copy: Path):
    shutil.copy(real_data("qwen/tokenizer.json"), copy / "tokenizer.json")
    (copy / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>", "tokenizer_class": "Qwen2Tokenizer"}')
    tokenizer = load_tokenizer(model(copy))
    assert type(tokenizer).__name__ == "Qwen2Tokenizer"
    assert tokenizer.encode("Answer: 12\n", add_special_tokens=False) == [16141, 25, 220, 16, 17, 198]
    with pytest.raises(ConfigError, match=r"151645.*vocab_size 128.*at least 151646"):
        check_tokenizer_fits(tokenizer, load_hf_config(model(copy)))


def test_no_eos_token_is_refused(copy: Path):
    (copy / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ConfigError, match="no EOS token"):
        load_tokenizer(model(copy))


def test_the_vocabulary_must_hold_every_token(model_folder: Path):
    tokenizer = load_tokenizer(model(model_folder))
    check_tokenizer_fits(tokenizer, load_hf_config(model(model_folder, init="random", overrides={"vocab_size": 100})))
    with pytest.raises(ConfigError, match=r"'~' has id 99.*vocab_size 99.*at least 100"):
        check_tokenizer_fits(
            tokenizer, load_hf_config(model(model_folder, init="random", overrides={"vocab_size": 99}))
        )


@pytest.mark.parametrize(
    ("stored", "expected"),
    [(None, (1,)), ({}, (1,)), ({"eos_token_id": 5}, (5, 1)), ({"eos_token_id": [1, 7, 7]}, (1, 7))],
)
def test_stop_tokens_are_those_of_the_generation_config_and_the_tokenizers_eos(copy: Path, stored, expected):
    if stored is not None:
        (copy / "generation_config.json").write_text(json.dumps(stored))
    assert stop_token_ids(model(copy), load_tokenizer(model(copy))) == expected


@pytest.mark.parametrize("eos", ["<eos>", [1, None], True, -1])
def test_stop_tokens_that_are_not_ids_are_refused(copy: Path, eos):
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(ConfigError, match="eos_token_id"):
        stop_token_ids(model(copy), load_tokenizer(model(copy)))


def test_a_tokenizer_without_a_padding_token_pads_with_its_end_of_sequence() -> None:
    assert pad_token(SimpleNamespace(pad_token_id=0, eos_token_id=5)) == 0
    assert pad_token(SimpleNamespace(pad_token_id=None, eos_token_id=5)) == 5
