"""slime's example of importance weights with rejection, in our words by hand."""

from __future__ import annotations

from typing import Any

import pytest

from tests.foreign.slime_runs import imported, ours

FUNCTION = {"custom-tis-function-path": "examples.train_infer_mismatch_helper.mis.compute_mis_weights_with_cp"}
MIS = {
    **FUNCTION, "use-tis": True, "use-rs": True, "tis-level": "token", "rs-level": "token", "tis-mode": "truncate",
    "tis-lower-bound": 0.5, "tis-upper-bound": 2.0, "rs-lower-bound": None, "rs-upper-bound": None, "rs-veto-threshold": 1e-4,
    "tis-batch-normalize": True,
}  # fmt: skip
"""examples/train_infer_mismatch_helper/mis.yaml at 624b824."""


def correction(flags: dict[str, Any]) -> dict[str, Any]:
    found = ours({**MIS, **flags})
    return {key: value for key, value in found.items() if key.startswith(("algo.tis", "algo.rejection"))}


def losses(flags: dict[str, Any]) -> dict[str, bool]:
    return imported({"lr-decay-style": "constant", **MIS, **flags}).losses


def test_the_examples_own_file() -> None:
    assert correction({}) == {
        "algo.tis.mode": "truncate",
        "algo.tis.level": "token",
        "algo.tis.cap": 2.0,
        "algo.tis.normalize": True,
        "algo.rejection": [{"level": "token", "lower": 0.5, "upper": 2.0}, {"level": "every", "lower": 1e-4}],
        "algo.rejection_divisor": "all",
    }
    assert losses({}) == {}


@pytest.mark.parametrize(
    ("flags", "tis"),
    [
        ({"tis-mode": "clip"}, ("truncate", "token", 2.0, 0.5)),
        ({"tis-mode": "clip", "tis-lower-bound": None}, ("truncate", "token", 2.0, 0.5)),
        (
            {"tis-mode": "mask", "tis-batch-normalize": False, "tis-level": "geometric"},
            ("icepop", "geometric", 2.0, 0.5),
        ),
        ({"tis-mode": "clip", "tis-upper-bound": 4.0, "tis-lower-bound": None}, ("truncate", "token", 4.0, 0.25)),
    ],
)
def test_weights(flags: dict[str, Any], tis: tuple[Any, ...]) -> None:
    found = correction({**flags, "use-rs": False})
    assert tuple(found[f"algo.tis.{name}"] for name in ("mode", "level", "cap", "lower")) == tis
    assert "algo.rejection" not in found and losses({**flags, "use-rs": False}) == {}


def test_rejection_with_bounds_of_its_own() -> None:
    flags = {"rs-level": "geometric", "rs-lower-bound": 0.99, "rs-upper-bound": 1.01, "rs-veto-threshold": None}
    assert correction(flags)["algo.rejection"] == [{"level": "geometric", "lower": 0.99, "upper": 1.01}]


def test_what_is_not_here() -> None:
    assert losses({"tis-mode": "mask"}) == {"tis-batch-normalize": True}
    assert losses({"tis-mode": "vtrace"}) == {"tis-mode": True}
    assert losses({"tis-mode": None}) == {"custom-tis-function-path": True}, "its file was not read"
