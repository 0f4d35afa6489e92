"""The test of dynamic sampling: a group gives a gradient only if its answers vary (DAPO, arXiv 2503.14476, section 3.2).

Change here: when a group varies. The test is on raw correctness, never on the shaped reward: with the overlong penalty,
groups of wrong answers of different lengths would vary, and the policy would learn only to be short.
"""

from __future__ import annotations

from typing import Literal

from dapo_mcore.types import Group

GroupKind = Literal["mixed", "all_right", "all_wrong", "unscored"]


def group_varies(group: Group) -> bool:
    """Return True if the group's scored samples differ in correctness: right and wrong, or more and less credit.

    A group of size one is kept if it was scored, as in verl. A larger group with one scored sample does not vary: that
    sample has no baseline.
    """
    kind = classify(group)
    return kind == "mixed" or (len(group.samples) == 1 and kind != "unscored")


def classify(group: Group) -> GroupKind:
    """Return `mixed`, `all_right` or `all_wrong` for the scored samples, `unscored` if there are none."""
    scores = [sample.score for sample in group.samples if sample.scored]
    if not scores:
        return "unscored"
    if len({score.acc for score in scores}) > 1:
        return "mixed"
    return "all_right" if scores[0].right else "all_wrong"
