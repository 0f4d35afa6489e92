from __future__ import annotations

from dapo_mcore.doctor import finding
from dapo_mcore.doctor.finding import Finding, State
from dapo_mcore.errors import ConfigError


def test_each_state_has_a_short_form_and_only_what_works_needs_no_remedy() -> None:
    assert finding.ok("a", "b") == Finding("a", State.OK, "b", "")
    assert finding.fallback("a", "b") == Finding("a", State.FALLBACK, "b", "")
    assert finding.hint("a", "b", "c") == Finding("a", State.HINT, "b", "c")
    assert finding.wrong("a", "b", "c") == Finding("a", State.WRONG, "b", "c")


def test_an_error_of_the_project_is_a_finding_whose_last_clause_is_the_remedy() -> None:
    def refuse() -> None:
        raise ConfigError("a is 3; b is 2; set a 2")

    def lack() -> None:
        raise ImportError("no module named x")

    assert finding.outcome("a", "fits", lambda: None) == finding.ok("a", "fits")
    assert finding.outcome("a", "fits", refuse) == finding.wrong("a", "a is 3; b is 2", "set a 2")
    assert finding.outcome("a", "fits", lack).state is State.WRONG
    assert finding.refusal("a", ConfigError("a is 3")) == finding.wrong("a", "a is 3", "")
