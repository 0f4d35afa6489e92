"""Which groups can teach: the test of dynamic sampling (DAPO, arXiv 2503.14476, section 3.2).

Change here: what it means for a group to vary. The metric is raw correctness, never the shaped reward: with the
overlong penalty inside, uniformly wrong groups of different lengths would vary, be kept, and teach only brevity.
"""

from __future__ import annotations

from typing import Literal

from dapo_mcore.types import Group

GroupKind = Literal["mixed", "all_right", "all_wrong", "unscored"]


def group_varies(group: Group) -> bool:
    """True when right and wrong answers are both present among the group's scored samples.

    A prompt that was sampled once (G = 1) has no group to vary in and is kept when it was scored, as in verl. One scored
    sample left of a larger group does not vary: its baseline would be 0 instead of what its lost siblings earned.
    """
    kind = classify(group)
    return kind == "mixed" or (len(group.samples) == 1 and kind != "unscored")


def classify(group: Group) -> GroupKind:
    """What the scored samples have in common: `mixed`, `all_right`, `all_wrong`, or `unscored` when there are none."""
    outcomes = {bool(sample.score.acc) for sample in group.samples if sample.scored}
    if not outcomes:
        return "unscored"
    if len(outcomes) == 2:
        return "mixed"
    return "all_right" if outcomes == {True} else "all_wrong"
