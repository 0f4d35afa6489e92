"""What the keys mean: how a word finds them, and that each has a text."""

from __future__ import annotations

import pytest

from dapo_mcore.config.key_help import describe_keys
from dapo_mcore.errors import ConfigError


def names(text: str) -> list[str]:
    """Return the keys of the answer, which begin at the margin."""
    return [line.partition(": ")[0] for line in text.splitlines() if line and line[0] != " "]


def test_a_key_comes_with_its_default_its_words_and_its_text() -> None:
    assert describe_keys(["best_mode"]) == (
        'checkpoint.best_mode: "max"    # max | min\n    Whether a higher or a lower best_metric is better.'
    )


def test_every_key_has_a_text() -> None:
    texts = describe_keys([]).split("\n\n")
    assert [text for text in texts if "\n    " not in text and not text.startswith(" ")] == []
    keys = names("\n\n".join(texts))
    assert len(keys) == len(set(keys)) > 250
    assert {"num_epochs", "data.files", "eval.sets", "eval.sets.NAME.top_k", "tools.N.sandbox.threads"} <= set(keys)
    assert {"eval", "data", "algo.rejection.0.level", "eval.sets.NAME.prompt_key"}.isdisjoint(keys)


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("best", ["checkpoint.keep_best", "checkpoint.best_metric", "checkpoint.best_mode"]),
        ("rollout.stop", ["rollout.stop"]),  # and no start_timeout_s of rollout.sglang
        ("algo.kl", ["algo.kl.coef", "algo.kl.estimator", "algo.kl.place"]),
        ("eval.every=20", ["eval.every"]),
        ("clip_higher", ["algo.clip_high"]),  # its text has it, as clip-higher
        (
            "warm up",
            [
                f"{section}warmup_{unit}"
                for section in ("optimizer.", "critic.optimizer.")
                for unit in ("updates", "rollout_steps")
            ]
            + ["critic.warmup_steps", "warm_start.warmup_updates"],
        ),
    ],
)
def test_a_word_finds_names_then_texts(word: str, found: list[str]) -> None:
    assert names(describe_keys([word])) == found


def test_a_foreign_name_is_answered_with_ours() -> None:
    told = describe_keys(["trainer.test_freq", "rollout.n"])
    assert told.startswith("trainer.test_freq is verl's name for eval.every")
    assert names(told)[2:] == ["eval.every", "rollout.group_size"]
    short = describe_keys(["overlong_filtering"])
    assert short.startswith(
        "overlong_filtering is NeMo-RL's name for reward.overlong.filter\n\nreward.overlong.filter: false"
    )


def test_words_that_are_nowhere_are_an_error_with_the_nearest_key() -> None:
    with pytest.raises(
        ConfigError, match=r"no key has 'rollout.gruop_size' in its .*; did you mean rollout.group_size\?"
    ):
        describe_keys(["rollout.gruop_size"])
    with pytest.raises(ConfigError, match=r"'xyzzy' .*`dapo-mcore keys` prints all"):
        describe_keys(["xyzzy"])
