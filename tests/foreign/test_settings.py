"""Records of foreign settings."""

from __future__ import annotations

from dapo_mcore.foreign.settings import NOT_COPIED, ForeignSetting, last_of_each_key


def test_the_last_setting_of_a_key_stands_in_the_place_of_the_first() -> None:
    settings = [ForeignSetting("a", 1, "l 1"), ForeignSetting("b", 2, "l 2"), ForeignSetting("a", 3, "l 3")]
    assert [(setting.key, setting.value, setting.where) for setting in last_of_each_key(settings)] == [
        ("a", 3, "l 3"),
        ("b", 2, "l 2"),
    ]


def test_secrets_are_not_copied() -> None:
    keys = ["wandb-key", "x.api_key", "env.hf_token", "my.password"]
    assert {setting.value for setting in last_of_each_key([ForeignSetting(key, "s3cr3t", "l") for key in keys])} == {
        NOT_COPIED
    }
    (kept,) = last_of_each_key([ForeignSetting("rollout.max_tokens", 5, "l")])
    assert kept.value == 5


def test_a_setting_is_known_without_doubts() -> None:
    assert ForeignSetting("a", 1, "l").is_known
    assert not ForeignSetting("a", "${X}", "l", ("X",)).is_known
    assert not ForeignSetting("a", 1, "l", depends=("line 1: if x",)).is_known
