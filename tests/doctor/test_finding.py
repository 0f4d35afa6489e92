from __future__ import annotations

from dapo_mcore.doctor import finding
from dapo_mcore.doctor.finding import Finding, State


def test_each_state_has_a_short_form_and_only_what_works_needs_no_remedy() -> None:
    assert finding.ok("a", "b") == Finding("a", State.OK, "b", "")
    assert finding.fallback("a", "b") == Finding("a", State.FALLBACK, "b", "")
    assert finding.hint("a", "b", "c") == Finding("a", State.HINT, "b", "c")
    assert finding.wrong("a", "b", "c") == Finding("a", State.WRONG, "b", "c")
