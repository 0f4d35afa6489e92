"""slime's defaults."""

from __future__ import annotations

from tests.foreign.slime_runs import imported, ours


def test_the_dropout_of_megatron_is_told() -> None:
    silent = imported({"attention-dropout": None, "hidden-dropout": None})
    assert silent.losses == {"lr-decay-style": False, "attention-dropout": True, "hidden-dropout": True}


def test_defaults_that_differ_from_ours_are_written() -> None:
    found = ours({})
    assert found["rollout.group_size"] == 1
    assert (found["optimizer.weight_decay"], found["optimizer.warmup_updates"]) == (0.01, 0)
    assert (found["data.chat_template"], found["data.shuffle"], found["data.prompt_key"], found["seed"]) == (
        False,
        False,
        "input",
        42,
    )
