"""Rules of the section `model`: levels and lists of what is recomputed."""

from __future__ import annotations

from pathlib import Path

import pytest

from dapo_mcore.config.file import dump_config, load_config
from dapo_mcore.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [("full", "full"), ("none", "none"), ("[mlp]", ["mlp"]), ("[core_attn, mlp]", ["core_attn", "mlp"])],
)
def test_recompute_is_a_level_or_a_list_of_modules(file: Path, text: str, value: str | list[str]) -> None:
    config = load_config(file, [f"model.recompute={text}"])
    assert config.model.recompute == value
    file.write_text(dump_config(config))
    assert load_config(file) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "mlp",
            r"model\.recompute: use none, selective, full, or a list of core_attn, mlp, .*shared_experts \(got 'mlp'\)",
        ),
        ("null", r"model\.recompute: use none, selective, full, or a list of core_attn"),
        ("[]", r"model\.recompute: a list has one or more of core_attn, .* each once; none recomputes nothing"),
        ("[mlp, mlp]", "each once"),
        ("[norm]", "a list has one or more of core_attn, mlp, layernorm"),
        ("[3]", "a list has one or more of core_attn, mlp, layernorm"),
        ("[moe, moe_act]", "moe recomputes moe_act with the whole layer; leave out one or the other"),
        ("[shared_experts, moe]", "moe recomputes shared_experts with the whole layer"),
    ],
)
def test_any_other_value_of_recompute_is_one_line(file: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load_config(file, [f"model.recompute={text}"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("recompute", ["none", "selective", "[mlp]"])
def test_offloaded_activations_need_full_recomputation(file: Path, recompute: str) -> None:
    assert load_config(file, ["model.recompute=full", "model.offload_activations=true"]).model.offload_activations
    with pytest.raises(ConfigError, match=r"offload_activations moves .*; set recompute full, or offload_activations"):
        load_config(file, [f"model.recompute={recompute}", "model.offload_activations=true"])
