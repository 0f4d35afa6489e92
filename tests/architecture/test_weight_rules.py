"""The weight rules themselves, as data: some written out by hand, and what holds for every one."""

from __future__ import annotations

import pytest

from dapo_mcore.architecture import weight_rules
from dapo_mcore.architecture.families import FAMILIES
from dapo_mcore.architecture.weight_rules import (
    ATTENTION,
    EMBEDDING,
    FINAL_NORM,
    MIXTRAL_EXPERTS,
    OUTPUT,
    QWEN_EXPERTS,
    TIED_OUTPUT,
    WeightRule,
)

EVERY = [
    rule
    for group in vars(weight_rules).values()
    for rule in (group if isinstance(group, tuple) else (group,))
    if isinstance(rule, WeightRule)
]


def test_queries_keys_and_values_are_one_parameter() -> None:
    assert ATTENTION[1] == WeightRule(
        mcore=("decoder.layers.{layer}.self_attention.linear_qkv.weight",),
        hf=tuple(f"model.layers.{{layer}}.self_attn.{letter}_proj.weight" for letter in "qkv"),
        sizes=(("query", "hidden"), ("key", "hidden"), ("key", "hidden")),
        tp_split="rows",
        merge="qkv",
    )


def test_the_experts_of_two_architectures_differ_in_hugging_faces_names_alone() -> None:
    first, second = MIXTRAL_EXPERTS[2], QWEN_EXPERTS[2]
    assert first.mcore == second.mcore == (
        "decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc1.weight",
        "decoder.layers.{layer}.mlp.experts.linear_fc1.weight{expert}",
    )  # fmt: skip
    assert first.key == second.key == "decoder.layers.mlp.experts.experts.linear_fc1.weight"
    assert first.hf == tuple(
        f"model.layers.{{layer}}.block_sparse_moe.experts.{{expert}}.{name}.weight" for name in ("w1", "w3")
    )
    assert second.hf == tuple(
        f"model.layers.{{layer}}.mlp.experts.{{expert}}.{name}_proj.weight" for name in ("gate", "up")
    )


def test_a_rule_is_of_the_model_of_a_layer_or_of_an_expert() -> None:
    rules = (EMBEDDING, FINAL_NORM, ATTENTION[0], MIXTRAL_EXPERTS[2])
    assert [rule.per_layer for rule in rules] == [False, False, True, True]
    assert [rule.per_expert for rule in rules] == [False, False, False, True]
    assert [rule.is_vocab for rule in rules] == [True, False, False, False]
    assert OUTPUT.is_vocab and TIED_OUTPUT.hf == EMBEDDING.hf


@pytest.mark.parametrize("rule", EVERY, ids=lambda rule: rule.hf[0])
def test_every_rule_is_consistent(rule: WeightRule) -> None:
    assert len(rule.sizes) == len(rule.hf) == {"one": 1, "gate_up": 2, "qkv": 3}[rule.merge]
    assert len({("{layer}" in name, "{expert}" in name) for name in (*rule.mcore, *rule.hf)}) == 1
    assert "{" not in rule.key
    dims = {len(size) for size in rule.sizes}
    assert len(dims) == 1 and dims <= {1, 2}
    assert rule.tp_split != "columns" or (dims == {2} and rule.merge == "one")


@pytest.mark.parametrize("architecture", FAMILIES)
def test_no_layer_has_two_rules_for_one_name(architecture: str) -> None:
    family = FAMILIES[architecture]
    for mlp in (family.dense, family.moe):
        names = [name for rule in (*family.attention, *mlp) for name in (*rule.mcore, *rule.hf)]
        assert len(names) == len(set(names))
