"""Trees of commands are values: equal texts give equal trees."""

from __future__ import annotations

from dapo_mcore.foreign.bash.commands import parse


def test_equal_texts_give_equal_trees() -> None:
    text = "if a; then b=1; else (c | d); fi\nfor x in 1 2; do e $x; done\n"
    assert parse(text, "run.sh") == parse(text, "run.sh")
    assert hash(parse(text, "run.sh")) == hash(parse(text, "run.sh"))
    assert parse(text, "run.sh") != parse(text, "run.sh", 2), "lines belong to a tree"
