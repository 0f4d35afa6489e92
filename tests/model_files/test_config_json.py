"""config.json as strict JSON, and the numbers in one that no model can have."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import pytest

from dapo_mcore.errors import ConfigError
from dapo_mcore.model_files.config_json import check_numbers, read_json_object, without_repeats
from tests.model_files.character_model import CONFIG

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


def told(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


TEXT = json.dumps(CONFIG)
FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "config.json is not valid JSON"),
    "no JSON": (b"{hidden_size: 16}", "config.json is not valid JSON: Expecting property name"),
    "a list": (b"[]", "config.json must hold a JSON object, not a list"),
    "a key twice": (TEXT.replace("{", '{"vocab_size": 64, ', 1).encode(), "'vocab_size' is given twice"),
    "UTF-16": (TEXT.encode("utf-16"), "config.json is UTF-16; save it as plain UTF-8"),
    "byte order mark": (
        codecs.BOM_UTF8 + TEXT.encode(),
        "config.json is UTF-8 with a byte order mark; save it as plain",
    ),
    "Latin-1": (b'{"note": "caf\xe9"}', "config.json is not UTF-8: byte 13 is 0xe9; save it as UTF-8"),
    "nested": (b'{"a":' * 100_000, "config.json is not valid JSON"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_json_object_is_refused(case: str, tmp_path: Path) -> None:
    raw, message = FILES[case]
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(ConfigError, match=message) as error:
        read_json_object(tmp_path / "config.json")
    assert told(error).startswith(f"{tmp_path}/config.json ")


def test_an_object_is_returned_with_its_keys_in_order(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes('{"b": "é", "a": {"c": [1, 2.5, null]}}'.encode())
    found = read_json_object(tmp_path / "config.json")
    assert found == {"b": "é", "a": {"c": [1, 2.5, None]}} and list(found) == ["b", "a"]


def test_a_key_that_is_given_twice_is_refused_at_any_depth() -> None:
    with pytest.raises(ValueError, match=r"^'b' is given twice$"):
        json.loads('{"a": [{"b": 1, "c": 2, "b": 1}]}', object_pairs_hook=without_repeats)


NUMBERS: dict[str, tuple[dict[str, Any], str]] = {
    "hidden -64": ({"hidden_size": -64}, "hidden_size -64 must be"),
    "hidden 16.5": ({"hidden_size": 16.5}, r"hidden_size 16\.5 must be a whole number"),
    "hidden true": ({"hidden_size": True}, "hidden_size True must be"),
    "hidden huge": ({"hidden_size": 10**30}, f"hidden_size {10**30} must be"),
    "hidden text": ({"hidden_size": "16"}, "hidden_size '16' must be"),
    "vocabulary 0": ({"vocab_size": 0}, "vocab_size 0 must be"),
    "layers 0": ({"num_hidden_layers": 0}, "num_hidden_layers 0 must be"),
    "heads 0": ({"num_attention_heads": 0}, "num_attention_heads 0 must be"),
    "key-value heads 0": ({"num_key_value_heads": 0}, "num_key_value_heads 0 must be"),
    "MLP 0": ({"intermediate_size": 0}, "intermediate_size 0 must be"),
    "positions 0": ({"max_position_embeddings": 0}, "max_position_embeddings 0 must be"),
    "eps 0": ({"rms_norm_eps": 0}, "rms_norm_eps 0 must be a finite number above 0"),
    "theta negative": ({"rope_theta": -1e4}, r"rope_theta -10000\.0 must be a finite number above 0"),
    "theta text": ({"rope_theta": "1e6"}, "rope_theta '1e6' must be"),
    "scaling text": ({"rope_scaling": "yarn"}, "rope_scaling 'yarn' must be an object"),
    "experts 0": (EXPERTS | {"num_experts": 0}, "num_experts 0 must be"),
    "too many chosen": (EXPERTS | {"num_experts_per_tok": 5}, "num_experts_per_tok 5 exceeds num_experts 4"),
    "factor 0": ({"rope_scaling": YARN | {"factor": 0}}, r"rope_scaling\.factor 0 must be a finite number above 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", NUMBERS)
def test_a_number_that_no_model_can_have_is_refused(case: str) -> None:
    changes, message = NUMBERS[case]
    with pytest.raises(ConfigError, match=message) as error:
        check_numbers(CONFIG | changes, "here")
    assert told(error).startswith("here: ") and told(error).endswith("; correct the numbers, or fetch the file again")


def test_numbers_that_a_model_can_have_are_accepted() -> None:
    check_numbers(
        CONFIG | EXPERTS | {"rope_scaling": YARN, "rope_parameters": None, "n_group": 8, "topk_group": 8}, "here"
    )
    check_numbers({"shared_expert_intermediate_size": 0, "vocab_size": 2**31 - 1}, "here")
