"""Settings of a command in a loop."""

from __future__ import annotations

from dapo_mcore.foreign.read.passes import one_setting_per_key
from dapo_mcore.foreign.settings import ForeignSetting


def test_a_key_that_differs_between_passes_names_all_values() -> None:
    passes = [[ForeignSetting("lr", lr, "l 3"), ForeignSetting("n", 8, "l 3")] for lr in (1e-6, 2e-6, 1e-6)]
    lr, n = one_setting_per_key(passes, 3)
    assert (lr.value, lr.others, lr.depends) == (1e-6, (2e-6,), ("line 3: a loop runs it more than once",))
    assert n.is_known
