"""Each key's values in words. Whole messages: tests/test_bad_input.py."""

from __future__ import annotations

import pytest

from dapo_mcore.config.allowed import allowed
from dapo_mcore.config.keys import keys_of, kind_of, options


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("parallel.hang_minutes", "a finite number that is above 0 and at most 1440, or null"),
        ("seed", "a whole number that is at least 0 and below 9223372036854775808"),
        ("checkpoint.keep_rollouts", "true or false"),
        ("algo.kl.estimator", "k1, k2 or k3"),
        ("data.chat_template", "true or false, or text, or null"),
        ("data.files", "a list whose length is at least 1, each item text"),
        ("data.files.0", "text"),
        ("observe.wandb_project", "text whose length is at least 1 and at most 128, or null"),
        ("eval.sets.heldout.limit", "a whole number that is at least 1 and at most 1000000000, or null"),
        ("warm_start.choose.limit", "a whole number that is at least 1 and at most 1000000000, or null"),
        ("megatron.anything.below", None),
    ],
)
def test_what_a_key_may_be_set_to(key, words):
    assert allowed(key.split("."))[1] == words


def test_an_alternative_of_a_type_is_no_part_of_the_key():
    assert allowed(["data", "chat_template", "bool"]).key == ["data", "chat_template"]
    assert allowed(["megatron", "num_layers"]).key == ["megatron", "num_layers"]


def test_every_key_has_words():
    sections = [[], *([name] for name in keys_of([]) if keys_of([name]))]
    keys = [[*section, key] for section in sections for key in keys_of(section)]
    assert len(keys) > 100 and not [key for key in keys if allowed(key).words is None or allowed(key).key != key]
    assert all(options(kind_of(key)) for key in keys)
